"""Dense rebuild: keys and values of every token of a layer, from its factors and exact tokens.

The reference that selective reconstruction is held against, and what fidelity is measured on.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from xkv_service.factors import LayerWindow, LowRank, PrefixFactors
from xkv_service.modeling.linear_state import fill_state
from xkv_service.stored import DTYPES


def rebuild(
    factors: PrefixFactors, layer: int, start: int = 0, stop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys before RoPE and values of positions start .. stop - 1 of one layer, exact tokens put back.

    Of a latent layer (MLA): latents [t, 1, kv_lora_rank], and rotated keys as cached [t, 1, rope_dim].

    Returns:
        [t, kv_heads, D] and [t, kv_heads, Dv] on the factors' device; on a CPU float32, else the spec's dtype.
    """
    stop = factors.tokens if stop is None else stop
    group, position = factors.locate(layer)
    heads = group.layout.kv_heads[position]
    dtype = DTYPES[factors.spec.dtype]
    keys = _rows(group.keys, position, start, stop, dtype).reshape(stop - start, heads, -1)
    if group.values is None:
        values = factors.rope_keys[layer][start:stop, None].to(keys.dtype)
    else:
        values = _rows(group.values, position, start, stop, dtype).reshape(stop - start, heads, -1)
    if layer in factors.exact:
        exact = factors.exact[layer]
        rows = slice(None) if (start, stop) == (0, factors.tokens) else _between(exact.positions, start, stop)
        where = exact.positions[rows].long() - start
        keys[where] = exact.keys[rows].to(keys.dtype)
        if group.values is not None:
            values[where] = exact.values[rows].to(values.dtype)
    return keys, values


def _between(positions: torch.Tensor, start: int, stop: int) -> slice:
    """Where ascending positions lie in start .. stop - 1; this waits for a GPU."""
    first, last = torch.searchsorted(positions.cpu(), torch.tensor([start, stop], dtype=torch.int32)).tolist()
    return slice(first, last)


def _rows(pair: LowRank, position: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows start .. stop - 1 of A B_l; on a GPU in `dtype`, also where bases times scales are float32."""
    left, right = pair.factors[start:stop], pair.layer_bases(position)
    right = right.float() if left.device.type == "cpu" else right.to(dtype)
    return left.to(right.dtype) @ right


def dense_cache(model: PreTrainedModel, factors: PrefixFactors, tokens: int | None = None) -> DynamicCache:
    """An ordinary Transformers cache of the first `tokens` tokens, for `generate(past_key_values=...)`.

    Args:
        model: the model the prefix was compressed with. tokens: 1 to T, by default T.

    Raises:
        ValueError: `tokens` is out of range, or less than T in a model with sliding-window or
            linear-attention layers.
    """
    length = factors.tokens if tokens is None else tokens
    if not 0 < length <= factors.tokens:
        raise ValueError(f"tokens={length} is out of range: the prefix has {factors.tokens}")
    if length < factors.tokens and factors.whole_only:
        kept = "sliding-window" if factors.windows else "linear-attention"
        raise ValueError(
            f"tokens={length}: a prefix with {kept} layers is rebuilt whole, all {factors.tokens} tokens"
        )
    cache = DynamicCache(config=model.config)
    for layer in factors.layers:
        keys, values = _rebuilt(factors, layer, length)
        cache.update(as_cached(keys, model), as_cached(values, model), layer)
    for layer, window in factors.windows.items():
        _fill_window(cache.layers[layer], window, model, length)
    for layer, state in factors.states.items():
        fill_state(cache.layers[layer], state, model.device)
    return cache


def _rebuilt(factors: PrefixFactors, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys and values of the first `length` tokens."""
    group, position = factors.locate(layer)
    table = factors.rotary[group.layout.rotary[position]]
    keys, values = rebuild(factors, layer, 0, length)
    return table.to(keys.device).rotate(keys, torch.arange(length, device=keys.device)), values


def as_cached(states: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """[t, kv_heads, D] as a cache holds it: [1, kv_heads, t, D] in the model's dtype, on its device."""
    return states.to(model.device, model.dtype).transpose(0, 1)[None].contiguous()


def _fill_window(
    layer: DynamicSlidingWindowLayer, window: LayerWindow, model: PreTrainedModel, length: int
) -> None:
    layer.update(as_cached(window.keys, model), as_cached(window.values, model))
    layer.cumulative_length = length
