"""Metrics: which errors of a layer's keys or values matter, each a choice that validation keeps or drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, get_args

import torch

from xkv_service.calibration.bases import Metric
from xkv_service.calibration.calibration import Kind
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.tolerance import Tolerances

Shape = Literal["query", "covariance", "output"]
Weighting = Literal[
    "plain",
    "tolerance",
    "tolerance+output",
    "tolerance+query",
    "tolerance+both",
    "tolerance+covariance",
    "tolerance+covariance+output",
]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

_SHAPES: Mapping[Weighting, Mapping[Kind, Shape]] = {
    "plain": {},
    "tolerance": {},
    "tolerance+output": {"value": "output"},
    "tolerance+query": {"key": "query"},
    "tolerance+both": {"key": "query", "value": "output"},
    "tolerance+covariance": {"key": "covariance"},
    "tolerance+covariance+output": {"key": "covariance", "value": "output"},
}
"""What says where within a head errors matter; the identity where nothing does."""

_LEAST_ERROR = 1e-6
"""Tolerated at least, as a share of the kind's mean variance: a layer that never varies tolerates nothing."""


class Metrics:
    """The metrics of a model's layers.

    Args:
        moments: second moments. tolerances: error that each layer stands.
        shapes: by position, float64 [kv_heads, D, D], or None where nothing is known. "query": energy of the
            queries that meet its keys, by plane; of latents what an error does to scores and outputs
            (`latent_metric`). "covariance": their covariance, averaged over positions. "output": W_oᵀ W_o
            summed over query heads.
    """

    def __init__(
        self,
        moments: Moments,
        tolerances: Tolerances,
        shapes: Mapping[Shape, Sequence[torch.Tensor | None]],
    ) -> None:
        self._moments, self._tolerances, self._shapes = moments, tolerances, shapes
        places = range(len(moments.layers))
        self._variance = {kind: [moments.variance(kind, place) for place in places] for kind in moments.kinds}

    def of(self, weighting: Weighting) -> Metric:
        """The metric of one weighting."""

        @cache
        def metric(place: int, kind: Kind) -> torch.Tensor:
            shape = self._shape(place, kind, weighting)
            return shape * (self._worth(place, kind, weighting) / self._scale(place, kind, shape))

        return metric

    def _shape(self, place: int, kind: Kind, weighting: Weighting) -> torch.Tensor:
        """Before scaling: the identity, or what the heads' queries or output projections say."""
        name = _SHAPES[weighting].get(kind)
        known = self._shapes[name][place] if name else None
        if known is not None:
            return known
        energy = self._moments.energy(kind, place)
        heads, dim = energy.shape
        return torch.eye(dim, dtype=torch.float64, device=energy.device).expand(heads, dim, dim).contiguous()

    def _scale(self, place: int, kind: Kind, shape: torch.Tensor) -> float:
        """The layer's variance in this metric over its plain variance: 1 for the identity."""
        if not self._variance[kind][place]:
            return float(shape.diagonal(dim1=-2, dim2=-1).mean())
        covariance = self._moments.covariance(kind, place)
        heads, dim = shape.shape[:2]
        blocks = covariance.reshape(heads, dim, heads, dim).diagonal(dim1=0, dim2=2)
        return float((blocks * shape.permute(1, 2, 0)).sum()) / self._variance[kind][place]

    def _worth(self, place: int, kind: Kind, weighting: Weighting) -> float:
        """What a unit of squared error costs: 1 over what is tolerated, or over the kind's mean variance."""
        typical = sum(self._variance[kind]) / len(self._variance[kind]) or 1.0
        if weighting == "plain":
            return 1 / typical
        return 1 / max(self._tolerances[place, kind].error, _LEAST_ERROR * typical)
