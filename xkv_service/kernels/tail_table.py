"""Where a batch's sessions keep exact tokens of one layer: what kernels find by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.kernels.addresses import addresses, table, upload

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


class TailRow:
    """One session's exact tokens of one layer: those of its document, and behind them its tail.

    It does not keep them alive.

    Args:
        exact: keys [e, kv_heads, D], rotated, and values [e, kv_heads, Dv], contiguous.
        tail: keys [kv_heads, n, D], rotated, and values [kv_heads, n, Dv]: the tokens of a head one behind
            the other, heads equally far apart.

    Attributes:
        addresses: of exact keys and values and of the tail's keys and values.
        sizes: e, and tokens from one head of the tail to the next.
        shape: kv_heads, D, Dv and the dtype: alike in one launch.

    Raises:
        ValueError: tensors that are laid out in another way.
    """

    def __init__(self, exact: States, tail: States) -> None:
        heads, _, dim = tail[0].shape
        self.shape = (heads, dim, tail[1].shape[2], tail[0].dtype)
        for fixed, states, size in zip(exact, tail, self.shape[1:3], strict=True):
            if not fixed.dtype == states.dtype == self.shape[3]:
                raise ValueError(f"exact tokens of {fixed.dtype} and a tail of {states.dtype}")
            if fixed.shape[1:] != (heads, size) or len(states) != heads:
                raise ValueError("exact tokens and tail have other heads or dimensions")
            if not fixed.is_contiguous() or not is_roomy(states):
                raise ValueError("kernels read tails whose heads are rows of tokens")
        room = tail[0].stride(0) // dim
        if tail[1].stride(0) != room * self.shape[2]:
            raise ValueError("keys and values of a tail have rooms of one size")
        self.addresses = addresses([*exact, *tail])
        self.sizes = [len(exact[0]), room]


class TailTable:
    """One layer's exact tokens and tails, one row for each session of a batch.

    The tables are tensors on the device, which a captured CUDA graph reads anew: `overwrite` them to run it
    for other sessions. How many tokens a tail has is no part of them.

    Args:
        rows: of one shape. device: of their tensors.

    Attributes:
        heads, dim, value_dim, dtype: of keys and values. sessions: how many. width: columns of the tables.
        addresses: int64 [4, width]. sizes: int32 [2, width].

    Raises:
        ValueError: rows of several shapes.
    """

    def __init__(self, rows: Sequence[TailRow], device: torch.device) -> None:
        self._shape = rows[0].shape
        self.heads, self.dim, self.value_dim, self.dtype = self._shape
        places, sizes = self._read(rows)
        self.addresses, self.sizes = upload(places, device), upload(sizes, device)
        self.sessions, self.width = len(rows), sizes.shape[1]

    @classmethod
    def of_rooms(cls, keys: torch.Tensor, values: torch.Tensor) -> TailTable:
        """Of tails side by side, [sessions, kv_heads, room, D] and [..., Dv], and no exact tokens before."""
        none = (keys.new_empty(0, *keys.shape[1::2]), values.new_empty(0, *values.shape[1::2]))
        return cls([TailRow(none, tail) for tail in zip(keys, values, strict=True)], keys.device)

    def overwrite(self, rows: Sequence[TailRow]) -> None:
        """Read other sessions, as many, from now on."""
        places, sizes = self._read(rows)
        self.addresses.copy_(places, non_blocking=True)
        self.sizes.copy_(sizes, non_blocking=True)

    def _read(self, rows: Sequence[TailRow]) -> tuple[torch.Tensor, torch.Tensor]:
        if any(row.shape != self._shape for row in rows):
            raise ValueError("tails of one launch have the same heads and dimensions")
        places, sizes = [row.addresses for row in rows], [row.sizes for row in rows]
        return table(places, torch.int64), table(sizes, torch.int32)


def is_roomy(tail: torch.Tensor) -> bool:
    """Whether [heads, n, D] holds each head's tokens one behind the other."""
    dim = tail.shape[2]
    return tail.stride(2) == 1 and (tail.stride(1) == dim or tail.shape[1] < 2) and tail.stride(0) % dim == 0
