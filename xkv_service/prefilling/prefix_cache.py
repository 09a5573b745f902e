"""A Transformers cache whose full-attention layers write into memory that somebody else keeps."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from xkv_service.modeling.linear_state import copy_state_layer

ExactLayer: TypeAlias = DynamicSlidingWindowLayer | LinearAttentionLayer


class StorageLayer(DynamicLayer):  # type: ignore[misc]
    """A growing cache layer in memory allocated once, so that nothing is copied as it grows.

    Args:
        capacity: tokens the storage holds; allocated at the first update. Past it the layer grows by copying.
        keys, values: storage [batch, heads, capacity, D] to use instead, of which `length` tokens are filled.
            Updates overwrite what lies behind them.
    """

    def __init__(
        self,
        capacity: int,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        length: int = 0,
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.key_storage, self.value_storage = keys, values
        if keys is not None and values is not None:
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
            self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate storage for `capacity` tokens in the shape of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_storage = _storage(key_states, self.capacity)
        self.value_storage = _storage(value_states, self.capacity)
        self.keys, self.values = self.key_storage[:, :, :0], self.value_storage[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, t, D]; returns views of everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._fits(key_states):
            return super().update(key_states, value_states)  # type: ignore[no-any-return]
        assert self.key_storage is not None and self.value_storage is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self.key_storage[:, :, start:end] = key_states.detach()
        self.value_storage[:, :, start:end] = value_states.detach()
        self.keys, self.values = self.key_storage[:, :, :end], self.value_storage[:, :, :end]
        return self.keys, self.values

    def _fits(self, states: torch.Tensor) -> bool:
        """Whether the layer still lives in its storage (beam search replaces it) and has room there."""
        assert self.key_storage is not None
        lives_here = self.keys.data_ptr() == self.key_storage.data_ptr() or self.keys.numel() == 0
        return (
            lives_here
            and states.shape[0] == self.key_storage.shape[0]
            and self.keys.shape[-2] + states.shape[-2] <= self.capacity
        )


def _storage(states: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, _, width = states.shape
    # An ordinary tensor: those made in inference mode cannot be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(batch, heads, capacity, width, dtype=states.dtype, device=states.device)


def copy_exact_layer(layer: ExactLayer) -> ExactLayer:
    """A sliding-window or linear-attention layer as it is now, with tensors of its own.

    As cached, a window is a view of a whole chunk, and states are changed in place.
    """
    if isinstance(layer, LinearAttentionLayer):
        return copy_state_layer(layer)
    taken = copy.copy(layer)
    if layer.keys is not None and layer.values is not None:
        taken.keys, taken.values = layer.keys.clone(), layer.values.clone()
    return taken
