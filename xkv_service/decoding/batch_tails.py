"""Exact tokens and tails of a batch's sessions at one layer, side by side as the decode kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.decoding.cache_layer import PrefixLayer

_GROWTH = 1.25
_STEP = 64
"""Tokens: the room of a batch is a multiple of it, so that kernels are compiled once."""


class BatchTails:
    """What every session attends to whatever it chooses: its prefix's exact tokens, then its tail.

    Args:
        layers: of one layer index, each of some rows that have got the keys and values of a new token.

    Attributes:
        keys, values: [sessions, kv_heads, room, D], contiguous, keys rotated.
        lengths: int32 [sessions], tokens of each.
    """

    def __init__(self, layers: Sequence[PrefixLayer]) -> None:
        first = layers[0]
        dtype, device = first.selection.prefix.dtype, first.keys.device
        sessions = sum(layer.keys.shape[0] for layer in layers)
        lengths = [len(layer.selection.prefix.exact_positions) + layer.tail_tokens for layer in layers]
        self._room = -(-int(max(lengths) * _GROWTH + 1) // _STEP) * _STEP
        with torch.inference_mode(False):  # a later step may not be in inference mode
            self.keys, self.values = (
                torch.empty(sessions, one.shape[1], self._room, one.shape[3], dtype=dtype, device=device)
                for one in (first.keys, first.values)
            )
            by_row = [
                length for length, layer in zip(lengths, layers, strict=True) for _ in range(len(layer.keys))
            ]
            self._ends = torch.tensor(by_row).to(device)
            self.lengths = self._ends.int()
            self._sessions = torch.arange(sessions, device=device)
        self._longest = max(lengths)
        row = 0
        for layer in layers:
            prefix, rows = layer.selection.prefix, slice(row, row + len(layer.keys))
            for room, exact, tail in (
                (self.keys, prefix.exact_keys, layer.keys),
                (self.values, prefix.exact_values, layer.values),
            ):
                room[rows, :, : len(exact)] = exact.transpose(0, 1)
                room[rows, :, len(exact) : len(exact) + tail.shape[2]] = tail
            row = rows.stop
        self._held = [layer.held() for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the room ahead included."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, layers: Sequence[PrefixLayer]) -> bool:
        """Take the newest token of every session.

        Returns:
            False: the tails are not those they were but for it, or there is no room.
        """
        held = [layer.held() for layer in layers]
        follow = all(now.follows(before) for now, before in zip(held, self._held, strict=True))
        if self._longest == self._room or not follow:
            return False
        for room, newest in (
            (self.keys, [layer.keys[:, :, -1] for layer in layers]),
            (self.values, [layer.values[:, :, -1] for layer in layers]),
        ):
            new = newest[0] if len(newest) == 1 else torch.cat(newest)
            room[self._sessions, :, self._ends] = new.to(room.dtype)
        self._ends += 1
        self.lengths += 1
        self._longest += 1
        self._held = held
        return True
