"""What a cache holds behind its prefix, as tensors by name (docs/format.md) and back."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from xkv_artifacts.errors import CorruptArtifact
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import LayerLayout
from xkv_service.modeling.linear_state import LayerState, fill_state
from xkv_service.sessions.context import Context
from xkv_service.stored import DTYPES, StoredTensor

_Tensors = Mapping[str, torch.Tensor]


def tail_tensors(context: Context) -> dict[str, torch.Tensor]:
    """Each layer's tail, window or states, on the CPU and contiguous, in the dtype it is cached in."""
    return {name: tensor.cpu().contiguous() for name, tensor in tail_views(context).items()}


def tail_views(context: Context) -> dict[str, torch.Tensor]:
    """The same where they are. They stay as they are, since caches grow behind what they hold."""
    return dict(_held(context))


def fill_tail(context: Context, ids: list[int], tensors: _Tensors) -> None:
    """Put a saved tail into a context that holds the prefix alone, and what was folded behind it.

    Args:
        ids: all tokens, those of the prefix first. tensors: as `tail_tensors` gives them, not trusted.

    Raises:
        CorruptArtifact: a tensor is missing, unknown, or not of this model's and these tokens' shape.
    """
    expected = dict(_expected(context, len(ids)))
    if expected.keys() != tensors.keys():
        name = min(expected.keys() ^ tensors.keys())
        raise CorruptArtifact(f"tensor {name[:80]}: {'missing' if name in expected else 'unknown'}")
    for name, stored in expected.items():
        if (tuple(tensors[name].shape), tensors[name].dtype) != (stored.shape, stored.dtype):
            raise CorruptArtifact(f"tensor {name}: must be {stored.dtype} of shape {list(stored.shape)}")
    for layout in _layers(context):
        start = f"layer.{layout.index}."
        mine = {name.removeprefix(start): tensors[name] for name in expected if name.startswith(start)}
        if mine:
            _fill(context.cache.layers[layout.index], layout, len(ids), mine, context.model.device)
    context.ids = array("i", ids)


def _layers(context: Context) -> tuple[LayerLayout, ...]:
    return inspect_loaded(context.model).layout.layers


def _expected(context: Context, tokens: int) -> Iterator[tuple[str, StoredTensor]]:
    """Name, shape and dtype of every tensor of a tail that ends at `tokens`."""
    for layout in _layers(context):
        name = f"layer.{layout.index}"
        if layout.state is not None:
            for kind, states in (("conv", layout.state.conv), ("recurrent", layout.state.recurrent)):
                for number, state in enumerate(states):
                    yield f"{name}.state.{kind}.{number}", StoredTensor(state.shape, DTYPES[state.dtype])
            continue
        part, count = "tail", tokens - context.fixed_tokens
        if layout.kind == "sliding":
            part, count = "window", min(tokens, context.cache.layers[layout.index].sliding_window - 1)
        for kind, dim in (("keys", layout.head_dim), ("values", layout.value_dim)):
            if count:
                shape = (count, layout.kv_heads, dim)
                yield f"{name}.{part}.{kind}", StoredTensor(shape, context.model.dtype)


def _held(context: Context) -> Iterator[tuple[str, torch.Tensor]]:
    for layout in _layers(context):
        layer, name = context.cache.layers[layout.index], f"layer.{layout.index}"
        if layout.state is not None:
            state = LayerState.of(layer)
            for kind, states in (("conv", state.conv), ("recurrent", state.recurrent)):
                yield from ((f"{name}.state.{kind}.{number}", one) for number, one in enumerate(states))
            continue
        sliding = layout.kind == "sliding"
        part, count = ("window", None) if sliding else ("tail", len(context.ids) - context.fixed_tokens)
        for kind, states in (("keys", layer.keys), ("values", layer.values)):
            if count != 0:
                kept = states[0] if count is None else states[0, :, -count:]
                yield f"{name}.{part}.{kind}", kept.transpose(0, 1)


def _fill(layer: Any, layout: LayerLayout, tokens: int, parts: _Tensors, device: torch.device) -> None:
    if layout.state is not None:
        conv = tuple(parts[f"state.conv.{number}"] for number in range(len(layout.state.conv)))
        count = len(layout.state.recurrent)
        recurrent = tuple(parts[f"state.recurrent.{number}"] for number in range(count))
        fill_state(layer, LayerState(conv, recurrent), device)
        return
    part = "window" if layout.kind == "sliding" else "tail"
    keys, values = (
        parts[f"{part}.{kind}"].to(device).transpose(0, 1)[None].contiguous() for kind in ("keys", "values")
    )
    if part == "tail":
        layer.update(keys, values)
    else:
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, tokens
