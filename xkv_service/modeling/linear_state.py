"""The states that a linear-attention layer keeps instead of keys and values, as tensors and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers.cache_utils import LinearAttentionLayer

from xkv_artifacts.manifest import StateLayout, StateShape
from xkv_service.errors import UnsupportedModel

_Layer = TypeVar("_Layer", bound=LinearAttentionLayer)

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class LayerState:
    """A linear-attention layer's exact states after the last token of a prefix, in the dtypes of its model.

    Args:
        conv: last inputs of each convolution. recurrent: each recurrence's state. Both without batch.
    """

    conv: tuple[torch.Tensor, ...]
    recurrent: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, layer: LinearAttentionLayer) -> LayerState:
        """Copies of what a cache layer with a batch of one holds (it changes its states in place)."""
        conv, recurrent = _held(layer)
        with torch.inference_mode(False):
            return cls(tuple(one[0].clone() for one in conv), tuple(one[0].clone() for one in recurrent))

    def layout(self, layer: int) -> StateLayout:
        """Shapes and dtypes, for the manifest."""
        return StateLayout(
            layer=layer, conv=tuple(map(_shape, self.conv)), recurrent=tuple(map(_shape, self.recurrent))
        )


def state_layout(index: int, layer: LinearAttentionLayer, model: str) -> StateLayout:
    """What layer `index` of `model` keeps, after a forward with a batch of one.

    Raises:
        UnsupportedModel: no state is in the cache, or one of a dtype that is not stored.
    """
    conv, recurrent = _held(layer)
    if not conv and not recurrent:
        raise UnsupportedModel(
            f"{model}: layer {index} keeps its state outside of the cache",
            hint="use a model whose linear-attention layers use Transformers' cache",
        )
    for state in (*conv, *recurrent):
        if state.dtype not in _DTYPES:
            raise UnsupportedModel(f"{model}: layer {index} keeps a state of {state.dtype}")
    return LayerState(tuple(state[0] for state in conv), tuple(state[0] for state in recurrent)).layout(index)


def fill_state(layer: LinearAttentionLayer, state: LayerState, device: torch.device) -> None:
    """Put copies of `state` into a cache layer, with a batch of one."""
    with torch.inference_mode(False):
        for number, conv in enumerate(state.conv):
            layer.lazy_initialization(conv_states=conv[None], state_idx=number)
            layer.conv_states[number] = conv[None].to(device, copy=True)
            layer.has_previous_state[number] = True
        for number, recurrent in enumerate(state.recurrent):
            layer.lazy_initialization(recurrent_states=recurrent[None], state_idx=number)
            layer.recurrent_states[number] = recurrent[None].to(device, copy=True)
    layer.device = device


def copy_state_layer(layer: _Layer) -> _Layer:
    """The layer as it is now, with states of its own."""
    taken = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(taken, name, dict(value))
    change_states(taken, torch.clone)
    return taken


def change_states(layer: LinearAttentionLayer, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `change` of each state, a new tensor, in its place."""
    # Ordinary tensors: those made in inference mode cannot be written to outside of it, as the layer does.
    with torch.inference_mode(False):
        for states in (layer.conv_states, layer.recurrent_states):
            for number, state in states.items():
                if state is not None:
                    states[number] = change(state)


def _held(layer: LinearAttentionLayer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Its convolution and recurrent states, each numbered from 0 without a gap."""
    return _leading(layer.conv_states), _leading(layer.recurrent_states)


def _leading(states: dict[int, torch.Tensor | None]) -> list[torch.Tensor]:
    held = [states[number] for number in sorted(states)]
    found = [state for state in held if state is not None]
    if any(state is None for state in held[: len(found)]):
        raise UnsupportedModel("a linear-attention layer leaves out one of its states")
    return found


def _shape(state: torch.Tensor) -> StateShape:
    return StateShape(shape=tuple(state.shape), dtype=_DTYPES[state.dtype])  # type: ignore[arg-type]
