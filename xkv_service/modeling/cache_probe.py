"""One short forward that shows what each layer caches and which attention module fills it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from xkv_service.modeling.observation import observe


@dataclass
class CacheProbe:
    """What a forward of four tokens showed, by layer index.

    Args:
        query_heads: heads of the queries that reached the attention function.
        modules: the attention module that filled the layer's cache.
        arguments: by `id(module)`, the arguments by name that it was called with.
        cache: the cache afterwards.
    """

    query_heads: dict[int, int] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    cache: DynamicCache = None
    _entered: dict[int, nn.Module] = field(default_factory=dict)

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        """Count the heads of queries [rows, heads, t, D] that reached a layer's attention."""
        self.query_heads[int(module.layer_idx)] = query.shape[1]  # type: ignore[arg-type]

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Keep what an attention module was called with, by name."""
        self._entered[int(module.layer_idx)] = module  # type: ignore[arg-type]
        self.arguments[id(module)] = arguments

    def on_update(self, layer: int) -> None:
        """The module entered last for a layer, when its cache is filled, is its attention module."""
        if layer in self._entered:
            self.modules[layer] = self._entered[layer]


class _NotingCache(DynamicCache):  # type: ignore[misc]
    def __init__(self, config: Any, probe: CacheProbe) -> None:
        super().__init__(config=config)
        self._probe = probe

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._probe.on_update(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def probe_cache(model: PreTrainedModel, *, last_token: int = 0) -> CacheProbe:
    """Run four tokens through the model (on the meta device only shapes come out).

    Args:
        last_token: id of the last token; the others are 1, 2, 3.

    Raises:
        RuntimeError: a model on the meta device whose code looks at values.
    """
    probe = CacheProbe()
    probe.cache = _NotingCache(model.config, probe)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.tensor([[1, 2, 3, last_token]], device=model.device) % vocabulary
    indexed = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    with torch.inference_mode(), observe(model, probe, indexed):
        model(input_ids=ids, past_key_values=probe.cache, use_cache=True)
    return probe


def looks_ahead(first: CacheProbe, second: CacheProbe) -> int | None:
    """The first layer where a change of the last token changed the keys of earlier ones, or None."""
    for index, (one, other) in enumerate(zip(first.cache.layers, second.cache.layers, strict=True)):
        if getattr(one, "keys", None) is None:
            continue
        before, after = one.keys[:, :, :-1].float(), other.keys[:, :, :-1].float()
        # Equal but for the order of sums (routing of experts): rounding, not attention.
        tolerance = max(1e-4, 2 * torch.finfo(one.keys.dtype).eps)
        if (before - after).norm() > tolerance * before.norm():
            return index
    return None
