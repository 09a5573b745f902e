"""What one more conversation over a prefix costs in memory."""

from __future__ import annotations

from typing import Any

from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.folded_prefix import folded_bytes


def tail_bytes(cache: Cache, prefix_tokens: int) -> int:
    """Bytes that a cache holds behind its prefix of `prefix_tokens` tokens, folded tokens included.

    Windows and states are each cache's own: all of their bytes count.
    """
    factors = [layer.selection.prefix for layer in cache.layers if isinstance(layer, PrefixLayer)]
    return folded_bytes(factors) + sum(_layer_bytes(layer, prefix_tokens) for layer in cache.layers)


def _layer_bytes(layer: Any, prefix_tokens: int) -> int:
    if isinstance(layer, LinearAttentionLayer):
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
        return sum(state.nbytes for state in states if state is not None)
    if layer.keys is None or layer.keys.ndim == 1:
        return 0
    hidden = 0 if layer.is_sliding or isinstance(layer, PrefixLayer) else prefix_tokens
    return sum(states[..., hidden:, :].nbytes for states in (layer.keys, layer.values))
