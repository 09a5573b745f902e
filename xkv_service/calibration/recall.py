"""How much of the model's attention a selection keeps, measured against the exact keys.

The recall of a head at one query token is the share of its attention, over everything it sees, that falls on
the tokens which a selection would attend to: the chosen ones, those kept exact and the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xkv_service.calibration.probes import ProbedPrefix, predictions
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.latent import LatentPrefix
from xkv_service.decoding.layer_prefix import ReadablePrefix
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.scoring import Scoring
from xkv_service.decoding.select import Selected, Selection
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.spec import SelectionSpec

Recall = dict[int, dict[Any, torch.Tensor]]
"""By layer and name of a choice, recall of each query token of every probe, the mean over heads."""


class RecallMeter:
    """Attends to every token of a layer's prefix, and notes what `choices` would have kept of it.

    Args:
        prefix: the layer's prefix. keys: its exact keys, rotated, [T, kv_heads, D].
        choices: selections of the layer, by name.

    Attributes:
        found: by the choices' names, recall of each query token, the mean over heads.
        chosen: what each chose at the last call.
    """

    reuses = False
    dense = True

    def __init__(self, prefix: ReadablePrefix, keys: torch.Tensor, choices: Mapping[Any, Selection]) -> None:
        self.prefix, self._choices = prefix, choices
        self._keys = keys.float().permute(1, 2, 0)
        self.found: dict[Any, list[float]] = {name: [] for name in choices}
        self.chosen: dict[Any, Selected] = {}

    def __call__(self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring) -> Selected:
        """As `Selection`, choosing every token; batches of one row without padding."""
        self.weights, self.rest = self._attention(queries, others, scoring)
        for name, choose in self._choices.items():
            self.chosen[name] = choose(queries, others, scoring)
            self.found[name] += self.kept(self.chosen[name])
        return Selected(self.prefix.positions)

    def kept(self, chosen: Selected) -> list[float]:
        """Recall of each query token of the last call, for any choice."""
        taken = self.weights[..., chosen.positions]
        if chosen.member is not None:
            taken = taken * chosen.member[:, :, None]
        found: list[float] = (taken.sum(-1) + self.rest).mean((0, 1, 2)).tolist()
        return found

    def _attention(
        self, queries: torch.Tensor, others: torch.Tensor, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares of the prefix's tokens [1, kv_heads, g, t, T], and of all else [1, kv_heads, g, t]."""
        scores = scoring(queries.flatten(2, 3).float() @ self._keys).reshape(*queries.shape[:4], -1)
        scores[..., self.prefix.exact_positions] = -torch.inf
        total = torch.logaddexp(scores.logsumexp(-1), others)
        return (scores - total[..., None]).exp(), (others - total).exp()


@torch.no_grad()
def measure_recall(
    prefix: Prefix, exact: Prefill, document: ProbedPrefix, choices: Mapping[Any, SelectionSpec]
) -> Recall:
    """Recall of every compressed layer on a document's probes, each layer attending to every token.

    Args:
        prefix: the document's factors, whose indexes choose. exact: its prefill, whose keys say what counts.
        choices: ways to choose, by name.
    """
    cache = XKVCache(prefix, SelectionSpec("dense"))
    meters: dict[int, Any] = {}
    for layer in cache.layers:
        if isinstance(layer, PrefixLayer):
            mine = prefix.layers[layer.index]
            selections = {name: Selection(mine, spec) for name, spec in choices.items()}
            meters[layer.index] = RecallMeter(mine, _exact_keys(mine, exact, layer.index), selections)
            layer.selection = meters[layer.index]
    with enable_xkv(prefix.model):
        predictions(prefix.model, cache, document.probes)
    return {
        layer: {name: torch.tensor(values) for name, values in meter.found.items()}
        for layer, meter in meters.items()
    }


def _exact_keys(prefix: ReadablePrefix, exact: Prefill, layer: int) -> torch.Tensor:
    """Keys as queries meet them, [T, kv_heads, D]: those of latent attention are expanded first."""
    if isinstance(prefix, LatentPrefix):
        return prefix.expanded(exact.keys(layer)[:, 0], exact.values(layer)[:, 0])
    return exact.rotated_keys(layer)
