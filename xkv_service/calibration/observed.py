"""What one pass over a sample leaves: moments of keys and values, and covariances of the probes' queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_service.calibration.latent_metric import expansion_maps
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.probes import ProbedPrefix, exact_cache, predictions
from xkv_service.calibration.query_covariance import average_over_positions
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout, ModelLayout
from xkv_service.modeling.observation import observe
from xkv_service.prefilling.prefill import prefill
from xkv_service.selection.sketch import candidate_planes
from xkv_service.spec import CompressionSpec

_SMALL_WIDTH = 8192


@dataclass
class Observed:
    """What one pass over the sample leaves. Parts of a sample add up.

    Args:
        moments: of keys and values.
        queries: by position, float64 [query_heads, D, D]: sums of qᵀq of the probes' queries, averaged over
            the positions of the document's tokens (`query_covariance`); of latent attention, as they meet
            what latents expand to.
        query_tokens: how many queries. planes: by position, candidate planes int64 [n, 2]; none of latents.
    """

    moments: Moments
    queries: list[torch.Tensor]
    query_tokens: int
    planes: list[torch.Tensor]

    @classmethod
    def nothing(cls, model: PreTrainedModel, reach: int) -> Observed:
        """Before the first document.

        Raises:
            UnsupportedModel: full and latent attention in one model.
        """
        layers = calibrated_layers(inspect_loaded(model).layout)
        queries = [
            torch.zeros(
                one.query_heads, *[_query_dim(model, one)] * 2, dtype=torch.float64, device=model.device
            )
            for one in layers
        ]
        return cls(Moments.empty(layers, reach, model.device), queries, 0, [])

    def add(self, other: Observed) -> None:
        """Add what was observed of other documents of the same model."""
        self.moments.add(other.moments)
        for mine, more in zip(self.queries, other.queries, strict=True):
            mine += more
        self.query_tokens += other.query_tokens
        self.planes = self.planes or other.planes


def calibrated_layers(layout: ModelLayout) -> tuple[LayerLayout, ...]:
    """The layers that a calibration is about.

    Raises:
        UnsupportedModel: some have full and some have latent attention.
    """
    if len({layer.kind for layer in layout.compressible}) > 1:
        raise UnsupportedModel(
            "a model of full and of latent attention has no calibration",
            hint="compress without one: --calibration none",
        )
    return layout.compressible


def _query_dim(model: PreTrainedModel, layer: LayerLayout) -> int:
    return layer.head_dim if layer.kind == "full" else expansion_maps(model, layer)[0].shape[-1]


def reach_of(layout: ModelLayout, settings: CalibrationSettings) -> int:
    """Neighbours whose products are kept: all in a small model, so that every pair can be compared.

    Raises:
        UnsupportedModel: full and latent attention in one model.
    """
    layers = calibrated_layers(layout)
    if sum(layer.key_width + layer.value_width for layer in layers) <= _SMALL_WIDTH:
        return len(layers) - 1
    return min(settings.group_size, len(layers)) - 1


@torch.no_grad()
def observe_document(model: PreTrainedModel, document: ProbedPrefix, found: Observed) -> None:
    """Add one document to what is observed.

    Raises:
        InvalidPrompt, UnsupportedModel: the model cannot run it.
    """
    exact = prefill(model, torch.tensor(document.token_ids))
    try:
        found.moments.observe(exact, CompressionSpec.sink)
        found.planes = found.planes or [
            candidate_planes(exact.planes(layer.index), layer.head_dim)
            for layer in found.moments.layers
            if layer.kind != "latent"
        ]
        watcher = _Queries(found.moments.layers, found.queries)
        with observe(model, watcher, []):
            predictions(model, exact_cache(exact), document.probes)
        for place, layer in enumerate(found.moments.layers):
            angles = exact.cos_sin(layer.index, min(CompressionSpec.sink, exact.tokens - 1))
            found.queries[place] += average_over_positions(
                watcher.sums[place], exact.planes(layer.index), *angles
            )
        found.query_tokens += sum(len(probe.token_ids) for probe in document.probes)
    finally:
        exact.free()


class _Queries:
    """Sums qᵀq of the rotated queries of the observed layers.

    Args:
        layers: those observed. like: a tensor of the shape of each one's sums.
    """

    def __init__(self, layers: Sequence[LayerLayout], like: Sequence[torch.Tensor]) -> None:
        self._place = {layer.index: place for place, layer in enumerate(layers)}
        self.sums = [torch.zeros_like(one) for one in like]

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        place = self._place.get(int(module.layer_idx))  # type: ignore[arg-type]
        if place is not None:
            rows = query[0].double()
            self.sums[place] += rows.mT @ rows

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Nothing."""
