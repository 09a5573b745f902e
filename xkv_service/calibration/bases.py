"""Shared bases of groups of layers, from second moments and a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xkv_service.calibration.calibration import CalibratedGroup, Kind, SharedBasis
from xkv_service.calibration.moments import Moments
from xkv_service.factorization.weights import apply_blocks, metric_weights

Metric = Callable[[int, Kind], torch.Tensor]
"""The metric of a layer, by its position: float64 [kv_heads, D, D]."""


def shared_group(moments: Moments, first: int, count: int, metric: Metric) -> CalibratedGroup:
    """Bases of the `count` layers from position `first` on: every direction."""
    layers = tuple(layer.index for layer in moments.layers[first : first + count])
    places = range(first, first + count)
    made = {
        kind: shared_basis(moments.gram(kind, first, count), [metric(place, kind) for place in places])
        for kind in moments.kinds
    }
    return CalibratedGroup(layers, made["key"], made.get("value"))


def shared_basis(gram: torch.Tensor, metric: Sequence[torch.Tensor]) -> SharedBasis:
    """The eigenvectors of Wᵀ G W, where M = W Wᵀ is the metric, as bases Vᵀ W⁻¹.

    Args:
        gram: float64 [W, W], the mean of xᵀx. metric: by layer, float64 [kv_heads, D, D].
    """
    weights = [metric_weights(one) for one in metric]
    transposed = [one.blocks.mT for one in weights]
    folded = apply_blocks(transposed, apply_blocks(transposed, gram).T)
    energies, vectors = torch.linalg.eigh((folded + folded.T) / 2)
    bases = apply_blocks([one.inverses.mT for one in weights], vectors.flip(1)).T
    return SharedBasis(
        bases.float().contiguous(),
        tuple(one.float() for one in metric),
        energies.flip(0).clamp_min(0).float(),
    )


def group_energies(moments: Moments, kind: Kind, first: int, count: int, metric: Metric) -> torch.Tensor:
    """Energies of a group's directions, descending: float64 [W]."""
    places = range(first, first + count)
    transposed = [metric_weights(metric(place, kind)).blocks.mT for place in places]
    folded = apply_blocks(transposed, apply_blocks(transposed, moments.gram(kind, first, count)).T)
    energies: torch.Tensor = torch.linalg.eigvalsh((folded + folded.T) / 2).flip(0).clamp_min(0)
    return energies
