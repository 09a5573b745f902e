"""A full-attention layer whose keys and values grow in place, into room that is made ahead.

Transformers' own layer makes new tensors at every token, which copies all that is held.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64
GROWTH = 1.25
"""Room made for so many times the tokens held."""


class _Room:
    """Tensors [rows, kv_heads, capacity, D] that several forks of a layer may look at.

    Each looks at its own first tokens. Who appends behind the last token that anybody wrote may write there;
    others copy.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        self.keys, self.values = _with_room(keys, tokens), _with_room(values, tokens)
        self._filled = keys.shape[-2]
        self._lock = threading.Lock()

    def claim(self, held: torch.Tensor, new: int) -> bool:
        """Whether `new` tokens may be written behind `held`, a view of the room."""
        begins = held.shape[-2] == 0 and held.dtype == self.keys.dtype  # a view of nothing has no address
        mine = begins or held.data_ptr() == self.keys.data_ptr()
        mine = mine and held.shape[0] == self.keys.shape[0]
        writable = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        with self._lock:
            free = held.shape[-2] == self._filled and self._filled + new <= self.keys.shape[-2]
            if not (mine and free and writable):
                return False
            self._filled += new
            return True

    def give_back(self, end: int, used: int) -> None:
        """Of tokens that were claimed up to `end` only those up to `used` were written."""
        with self._lock:
            if self._filled == end:
                self._filled = used

    def write(
        self, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new tokens at `start`; returns all up to and with them."""
        end = start + keys.shape[-2]
        self.keys[..., start:end, :], self.values[..., start:end, :] = keys, values
        return self.keys[..., :end, :], self.values[..., :end, :]


@dataclass(frozen=True)
class Held:
    """Which tokens a layer holds.

    Args:
        room: they are the first ones in it, where nothing is ever written twice. None: they are elsewhere.
        tokens: how many.
    """

    room: _Room | None
    tokens: int

    def follows(self, before: Held) -> bool:
        """Whether these are the tokens of `before` and one more."""
        return self.room is not None and self.room is before.room and self.tokens == before.tokens + 1


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """As `DynamicLayer`. Copies share what they hold until they part: nothing is copied before.

    Attributes:
        keys, values: [rows, kv_heads, n, D], or None.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._room: _Room | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, the room ahead included."""
        if self.keys is None or self.keys.ndim == 1:
            return 0
        if self._room is not None and self.keys.data_ptr() == self._room.keys.data_ptr():
            return self._room.keys.nbytes + self._room.values.nbytes
        return int(self.keys.nbytes + self.values.nbytes)

    def held(self) -> Held:
        """What it holds now: says whether it is what another layer held, or this one before."""
        mine = self._room is not None and self.keys.data_ptr() == self._room.keys.data_ptr()
        return Held(self._room if mine else None, int(DynamicLayer.get_seq_length(self)))

    def reserve(self, tokens: int = 1) -> int:
        """Claim room behind the tokens held, for somebody who writes there by address, then tells `extend`.

        Until then nothing else may be appended.

        Args:
            tokens: to be written next.

        Returns:
            Tokens that may be written: at least as many, and at least `_LEAST_ROOM`.
        """
        held, least = int(DynamicLayer.get_seq_length(self)), max(_LEAST_ROOM, tokens)
        free = 0 if self._room is None else self._room.keys.shape[-2] - held
        if self._room is None or free < least or not self._room.claim(self.keys, free):
            self._room = _Room(self.keys, self.values, held + least)
            free = self._room.keys.shape[-2] - held
            self.keys, self.values = (one[..., :held, :] for one in (self._room.keys, self._room.values))
            self._room.claim(self.keys, free)
        return free

    @property
    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, kv_heads, capacity, D] of the reserved room, the tokens held before it."""
        assert self._room is not None
        return self._room.keys, self._room.values

    def extend(self, tokens: int) -> None:
        """The first `tokens` tokens of the reserved room have been written; the rest is free again."""
        assert self._room is not None
        end = int(DynamicLayer.get_seq_length(self)) + tokens
        self._room.give_back(self._room.keys.shape[-2], end)
        self.keys, self.values = (one[..., :end, :] for one in (self._room.keys, self._room.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append t tokens [rows, kv_heads, t, D]; returns all n + t."""
        if key_states.requires_grad or value_states.requires_grad:  # gradients need what was there before
            result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            return result
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = int(DynamicLayer.get_seq_length(self))
        if held == 0:
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        room, new = self._room, key_states.shape[-2]
        if room is None or not room.claim(self.keys, new):
            room = self._room = _Room(self.keys, self.values, held + new)
            room.claim(room.keys[..., :held, :], new)
        self.keys, self.values = room.write(held, key_states, value_states)
        return self.keys, self.values


def _with_room(states: torch.Tensor, tokens: int) -> torch.Tensor:
    capacity = max(_LEAST_ROOM, int(tokens * GROWTH))
    room = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
    room[..., : states.shape[-2], :] = states
    return room
