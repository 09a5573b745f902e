"""How much of a calibration hangs on which documents its sample happened to hold: a bootstrap of the plan.

Parts of the sample are drawn again with replacement, and the plan is made of each draw: groups, bits, bases.
Bases of a draw are held against the documents that it left out. The tolerances stay those measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch

from xkv_service.calibration.bases import Metric, group_energies
from xkv_service.calibration.calibration import KINDS, Calibration
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.figures import PLAN_TOKENS
from xkv_service.calibration.folds import Folds
from xkv_service.calibration.metrics import Weighting
from xkv_service.calibration.observed import Observed
from xkv_service.calibration.plan import ColumnPlan, factor_bits
from xkv_service.packed_factors import Runs, rank_of

RESAMPLES = 20
"""Nine in ten further draws lie between the least and the greatest of 20."""
_CHOICES = 1000

Groups = Sequence[tuple[int, int]]
"""(position of the first layer, how many) of each group."""
Plan = list[tuple[Runs, Runs]]


@dataclass(frozen=True)
class _Drawn:
    """One draw's plan.

    Args:
        groups: that its own search finds. bits: of a token, by group of the calibration and kind.
        captured, kept: energy of left-out documents that its bases hold, over all of it and over what as many
            directions of their own hold; None where none was left out.
    """

    groups: tuple[tuple[int, int], ...]
    bits: tuple[int, ...]
    captured: float | None
    kept: float | None


def bootstrap(
    folds: Folds, candidates_of: Callable[[Observed], Candidates], weighting: Weighting, groups: Groups
) -> dict[str, Any] | None:
    """What a report says about draws of the sample, plain JSON values; None if it has one part only.

    Args:
        candidates_of: makes candidates of sums. weighting, groups: those of the calibration.
    """
    count = len(folds.parts)
    if count < 2:
        return None

    @cache
    def drawn(numbers: tuple[int, ...]) -> _Drawn:
        candidates = candidates_of(folds.drawn(numbers))
        return _of_one(candidates, folds.left_out(numbers), weighting, groups)

    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(count, (RESAMPLES, count), generator=generator)
    found = [drawn(tuple(numbers)) for numbers in draws.sort(1).values.tolist()]
    _, whole = _planned(candidates_of(folds.total()), weighting, groups)
    layers = [layer.index for layer in folds.parts[0].moments.layers]
    return {
        "documents": folds.documents,
        "parts": count,
        "resamples": RESAMPLES,
        "kept": _spread([one.kept for one in found]),
        "captured": _spread([one.captured for one in found]),
        "groups": _partitions(found, layers),
        "bits": _bits(found, _bits_of(whole), groups, layers),
    }


def _of_one(
    candidates: Candidates, left_out: Observed | None, weighting: Weighting, groups: Groups
) -> _Drawn:
    made, plan = _planned(candidates, weighting, groups)
    captured, best, total = (0.0, 0.0, 0.0) if left_out is None else _energies(left_out, made, plan, groups)
    return _Drawn(
        tuple(candidates.best_groups(weighting)),
        _bits_of(plan),
        captured / total if total else None,
        captured / best if best else None,
    )


def _planned(candidates: Candidates, weighting: Weighting, groups: Groups) -> tuple[Calibration, Plan]:
    made, ratio = candidates.calibration(weighting, groups), candidates.settings.ratio
    columns = ColumnPlan(made, calibrated_spec(ratio, made), PLAN_TOKENS)
    return made, columns.runs(factor_bits(candidates.layers, ratio))


def _bits_of(plan: Plan) -> tuple[int, ...]:
    return tuple(sum(width * number for width, number in runs) for pair in plan for runs in pair)


def _energies(
    left_out: Observed, made: Calibration, plan: Plan, groups: Groups
) -> tuple[float, float, float]:
    """Energy of documents, in the metric, along the plan's directions, along the best ones, and in all."""
    sums = [0.0, 0.0, 0.0]
    for number, (first, count) in enumerate(groups):
        for kind, runs in zip(made.groups[number].kinds, plan[number], strict=False):
            basis, rank = made.groups[number].basis(kind), rank_of(runs)
            axes = basis.projection(rank).double()
            gram = left_out.moments.gram(kind, first, count)
            own = group_energies(left_out.moments, kind, first, count, _known(first, basis.metric))
            sums[0] += float(((gram @ axes) * axes).sum())
            sums[1] += float(own[:rank].sum())
            sums[2] += float(own.sum())
    return sums[0], sums[1], sums[2]


def _known(first: int, metrics: Sequence[torch.Tensor]) -> Metric:
    """The metric of layers from position `first` on."""
    return lambda place, _: metrics[place - first]


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [one for one in values if one is not None]
    return {"mean": fmean(known), "low": min(known), "high": max(known)} if known else None


def _partitions(found: Sequence[_Drawn], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Partitions that draws find, the most frequent first, with their shares."""
    counted = Counter(one.groups for one in found)
    return [
        {"groups": [layers[first : first + count] for first, count in groups], "share": number / len(found)}
        for groups, number in counted.most_common()
    ]


def _bits(
    found: Sequence[_Drawn], whole: Sequence[int], groups: Groups, layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Bits of a token in each group's keys and values: of the whole sample, least and most of the draws."""
    places = [(first, count, kind) for first, count in groups for kind in KINDS]
    return [
        {
            "layers": layers[first : first + count],
            "kind": kind,
            "bits": whole[number],
            "low": min(one.bits[number] for one in found),
            "high": max(one.bits[number] for one in found),
        }
        for number, (first, count, kind) in enumerate(places)
    ]


def chosen_again(divergences: Mapping[str, Sequence[float]], chosen: str) -> float | None:
    """Share of draws of the held-out documents in which the choice would be the same.

    Args:
        divergences: of each candidate, by document; those not measured on all of them are left out.

    Returns:
        None where one document says everything.
    """
    count = len(divergences[chosen])
    if count < 2:
        return None
    compared = [name for name, found in divergences.items() if len(found) == count]
    measured = torch.tensor([list(divergences[name]) for name in compared], dtype=torch.float64)
    draws = torch.randint(count, (_CHOICES, count), generator=torch.Generator().manual_seed(0))
    best = measured[:, draws].mean(-1).argmin(0)
    return float((best == compared.index(chosen)).double().mean())
