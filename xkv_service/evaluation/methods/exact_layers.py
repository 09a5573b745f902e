"""What the methods leave alone: sliding-window and linear-attention layers, and a cache put around them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xkv_service.modeling.layout import CACHE_NUMBER_BYTES
from xkv_service.prefilling.prefilled import Prefill


@dataclass(frozen=True, eq=False)
class ExactLayers:
    """The layers of a prefix that keep no key of every token, exact, in memory of their own.

    Args:
        config: the model's.
        layers: cache layers by index.
        nbytes: their share of the exact cache.
    """

    config: Any
    layers: Mapping[int, Any]
    nbytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, exact: Prefill) -> ExactLayers:
        """Those of a prefill; none in a model that has only full attention."""
        cached = exact.cache().layers
        growing = exact.layout.compressible
        full = {layer.index for layer in growing}
        width = sum(layer.key_width + layer.value_width for layer in growing)
        return cls(
            config=model.config,
            layers={
                layer.index: cached[layer.index] for layer in exact.layout.layers if layer.index not in full
            },
            nbytes=exact.layout.bytes_full(exact.tokens) - CACHE_NUMBER_BYTES * width * exact.tokens,
        )

    def cache(self, full: Mapping[int, DynamicLayer]) -> DynamicCache:
        """A new cache of these layers, copied, and of the full-attention layers given by index."""
        cache = DynamicCache(config=self.config)
        for index, layer in full.items():
            cache.layers[index] = layer
        for index, layer in self.layers.items():
            cache.layers[index] = copy.deepcopy(layer)
            if isinstance(layer, DynamicSlidingWindowLayer):
                cache.layers[index].activate_past_recording()  # so that the tail can be cropped
        return cache


def number_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all numbers of the tensors at 16 bits each, whatever dtype this machine computes in."""
    return CACHE_NUMBER_BYTES * sum(tensor.numel() for tensor in tensors)


def filled_layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """An ordinary growing cache layer that starts with a copy of keys and values [1, kv_heads, t, D]."""
    layer = DynamicLayer()
    layer.update(keys, values)
    return layer
