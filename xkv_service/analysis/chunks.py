"""Several layers' states side by side, a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

ReadChunk = Callable[[int, int, int], torch.Tensor]
"""read(layer, start, stop): positions start .. stop - 1, any float dtype, [t, heads, D] or [t, W]."""

_CHUNK_BYTES = 64 * 2**20


def joined_rows(read: ReadChunk, layers: Sequence[int], width: int, tokens: int) -> Iterator[torch.Tensor]:
    """The layers' states of all tokens, in order: float64 [t, W] each, W = `width` of all the layers."""
    step = max(1, _CHUNK_BYTES // (8 * width))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        yield torch.cat([read(layer, start, stop).flatten(1).double() for layer in layers], dim=1)
