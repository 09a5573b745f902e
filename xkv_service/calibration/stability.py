"""Whether a sample is large enough: what the bases of one half of it keep of the other half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from xkv_service.calibration.calibration import CalibratedGroup, Calibration, Kind
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.plan import ColumnPlan, factor_bits
from xkv_service.factorization.weights import apply_blocks, metric_weights
from xkv_service.packed_factors import rank_of

ENOUGH = 0.98
"""Below, more documents would give other bases."""


def stability(halves: Sequence[Moments], calibration: Calibration, ratio: float) -> float | None:
    """Energy that each half keeps under the other half's leading directions over what it keeps under its own.

    In the calibration's groups and metric, with as many directions as its plan has at `ratio`. 1 is a sample
    whose halves agree; None: there are not two halves.
    """
    if len(halves) < 2:
        return None
    other = own = 0.0
    for group, first, ranks in _planned(halves[0], calibration, ratio):
        for kind, rank in zip(group.kinds, ranks, strict=False):
            grams = [_folded(half, kind, first, group) for half in halves]
            axes = [torch.linalg.eigh(gram)[1].flip(1)[:, :rank] for gram in grams]
            for gram, mine, theirs in zip(grams, axes, reversed(axes), strict=True):
                own += _kept(gram, mine)
                other += _kept(gram, theirs)
    return other / own if own else None


def _planned(
    moments: Moments, calibration: Calibration, ratio: float
) -> Iterator[tuple[CalibratedGroup, int, tuple[int, int]]]:
    """Each group, the position of its first layer, and the plan's ranks of keys and of values."""
    plan = ColumnPlan(calibration, calibrated_spec(ratio, calibration), moments.tokens)
    runs = plan.runs(factor_bits(moments.layers, ratio))
    first = 0
    for group, (keys, values) in zip(calibration.groups, runs, strict=True):
        yield group, first, (rank_of(keys), rank_of(values))
        first += len(group.layers)


def _folded(moments: Moments, kind: Kind, first: int, group: CalibratedGroup) -> torch.Tensor:
    """Wᵀ G W of one group, where the metric is M = W Wᵀ: float64 [W, W]."""
    gram = moments.gram(kind, first, len(group.layers))
    transposed = [metric_weights(one).blocks.mT for one in group.basis(kind).metric]
    folded = apply_blocks(transposed, apply_blocks(transposed, gram).T)
    return (folded + folded.T) / 2


def _kept(gram: torch.Tensor, axes: torch.Tensor) -> float:
    return float(((gram @ axes) * axes).sum())
