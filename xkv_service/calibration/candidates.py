"""Calibrations to choose from: groups, metrics and bases of one set of moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_service.calibration.allocation import Offers, least_cost
from xkv_service.calibration.bases import Metric, group_energies, shared_group
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.latent_metric import latent_metric
from xkv_service.calibration.metrics import Metrics, Shape, Weighting
from xkv_service.calibration.observed import Observed
from xkv_service.calibration.partition import partition
from xkv_service.calibration.plan import factor_bits
from xkv_service.calibration.query_covariance import covariance_metric
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.tolerance import Tolerances
from xkv_service.factorization.weights import output_metric, output_projection, query_metric
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout
from xkv_service.packed_factors import BITS, rank_of
from xkv_service.selection.sketch import choose_planes


class Candidates:
    """Makes calibrations of one set of moments.

    Args:
        found, tolerances: what was measured of `model`. settings: which groups and how many directions.
    """

    def __init__(
        self, model: PreTrainedModel, found: Observed, tolerances: Tolerances, settings: CalibrationSettings
    ) -> None:
        self.found, self.settings = found, settings
        self.moments = found.moments
        self.layers = found.moments.layers
        modules, places = inspect_loaded(model).modules, range(len(self.layers))
        shapes: dict[Shape, list[torch.Tensor | None]]
        if self.layers[0].kind == "latent":
            covariances = map(self._query_covariance, places)
            latents = [latent_metric(model, *one) for one in zip(self.layers, covariances, strict=True)]
            shapes = {"query": [*latents]}
        else:
            shapes = {
                "query": [self._query_metric(place) for place in places],
                "covariance": [self._covariance_metric(place) for place in places],
                "output": [_output_metric(modules[layer.index], layer) for layer in self.layers],
            }
        self.metrics = Metrics(self.moments, tolerances, shapes)

    def fixed_groups(self) -> list[tuple[int, int]]:
        """(first, count) of groups of the same size, as the paper has them."""
        size, count = self.settings.group_size, len(self.layers)
        return [(first, min(size, count - first)) for first in range(0, count, size)]

    def best_groups(self, weighting: Weighting) -> list[tuple[int, int]]:
        """The partition of least cost at the price that bits have at the settings' ratio."""
        metric = self.metrics.of(weighting)
        fixed = [energies for group in self.fixed_groups() for energies in self._energies(metric, *group)]
        price = Offers(fixed, BITS).price(self._bits_per_token(self.settings.ratio))

        def cost(first: int, count: int) -> float:
            return sum(least_cost(one, price, BITS) for one in self._energies(metric, first, count))

        return partition(len(self.layers), self.settings.group_size, cost)

    def calibration(self, weighting: Weighting, groups: Sequence[tuple[int, int]]) -> Calibration:
        """Bases of the groups in a metric."""
        metric = self.metrics.of(weighting)
        made = [shared_group(self.moments, first, count, metric) for first, count in groups]
        energies = [group.basis(kind).energies for group in made for kind in group.kinds]
        ranks = map(rank_of, Offers(energies, BITS).runs(self._bits_per_token(self.settings.most_ratio)))
        kept = tuple(group.leading(next(ranks), 0 if group.values is None else next(ranks)) for group in made)
        planes = {
            layer.index: self._planes(place)
            for place, layer in enumerate(self.layers)
            if layer.kind != "latent"
        }
        return Calibration(kept, planes, id="candidate")

    def _energies(self, metric: Metric, first: int, count: int) -> list[torch.Tensor]:
        return [group_energies(self.moments, kind, first, count, metric) for kind in self.moments.kinds]

    def _bits_per_token(self, ratio: float) -> float:
        return factor_bits(self.layers, ratio)

    def _planes(self, place: int) -> torch.Tensor:
        candidates = self.found.planes[place]
        energy = self.moments.energy("key", place)
        return choose_planes(energy, self._query_energy(place), candidates, len(candidates)).cpu()

    def _query_energy(self, place: int) -> torch.Tensor:
        return self._query_covariance(place).diagonal(dim1=-2, dim2=-1)

    def _query_covariance(self, place: int) -> torch.Tensor:
        return self.found.queries[place] / max(1, self.found.query_tokens)

    def _covariance_metric(self, place: int) -> torch.Tensor:
        return covariance_metric(self._query_covariance(place), self.layers[place].kv_heads)

    def _query_metric(self, place: int) -> torch.Tensor:
        energy, planes = self._query_energy(place), self.found.planes[place]
        return query_metric(energy, planes, self.layers[place].kv_heads)


def _output_metric(module: nn.Module, layer: LayerLayout) -> torch.Tensor | None:
    weight = output_projection(module, layer.query_heads * layer.value_dim)
    return None if weight is None else output_metric(weight, layer.query_heads, layer.kv_heads)
