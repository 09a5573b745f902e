"""Gram matrices G = XᵀX, accumulated chunk by chunk so that X [T, width] never exists as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xkv_service.kernels.wide_copy import copy_states

ReadChunk = Callable[[int, int, int], torch.Tensor]


def product_dtype(cached: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype chunks are multiplied in: float64, but for a 16-bit cache on an accelerator.

    There it is the cache's own, with float32 sums: products of values are exact, and rounding a key before
    RoPE to it adds no more than the model's own rounding of the cached key.
    """
    return cached if device.type != "cpu" and cached.itemsize == 2 else torch.float64


def gram_dtype(product: torch.dtype) -> torch.dtype:
    """The dtype products of dtype `product` are summed in."""
    return torch.float64 if product == torch.float64 else torch.float32


def accumulate_gram(
    read: ReadChunk,
    widths: Sequence[int],
    span: tuple[int, int],
    *,
    chunk_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """G = XᵀX of the concatenated layers X = [X_0 | X_1 | ...] over the tokens of `span`.

    Args:
        read: `read(i, start, stop)` gives layer i's rows as [stop - start, heads, D], any float dtype.
        widths: features of each layer, `prod` of `read`'s trailing dimensions.
        span: first and one past the last token. chunk_tokens: rows in memory at once.
        dtype: dtype of the products (`product_dtype`). device: where to compute.
        out: zeroed [W, W] of `gram_dtype(dtype)` to sum into, or None for a new one.

    Returns:
        [W, W] symmetric, W = sum(widths).
    """
    width = sum(widths)
    total = torch.zeros(width, width, dtype=gram_dtype(dtype), device=device) if out is None else out
    start, stop = span
    buffer = torch.empty(min(chunk_tokens, stop - start), width, dtype=dtype, device=device)
    for first in range(start, stop, chunk_tokens):
        last = min(first + chunk_tokens, stop)
        rows = fill_rows(buffer, read, widths, first, last)
        _add_products(total, rows, widths)
    return _mirror(total, widths)


def fill_rows(
    buffer: torch.Tensor, read: ReadChunk, widths: Sequence[int], start: int, stop: int
) -> torch.Tensor:
    """Rows [stop - start, W] of the concatenated layers, written into the head of `buffer`."""
    rows = buffer[: stop - start]
    offset = 0
    for index, width in enumerate(widths):
        states = read(index, start, stop)
        copy_states(rows[:, offset : offset + width].view(states.shape), states)
        offset += width
    return rows


def _add_products(total: torch.Tensor, rows: torch.Tensor, widths: Sequence[int]) -> None:
    """Add rowsᵀ·rows on and right of the block diagonal only: 10 of 16 blocks for four layers."""
    offset = 0
    for width in widths:
        panel = slice(offset, offset + width)
        left, right = rows[:, panel].T, rows[:, offset:]
        target = total[panel, offset:]
        if left.dtype.itemsize == 2:
            target += torch.mm(left, right, out_dtype=torch.float32)
        else:
            target.addmm_(left, right)
        offset += width


def _mirror(total: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Copy the blocks right of the block diagonal to below it."""
    offset = 0
    for width in widths:
        end = offset + width
        total[end:, offset:end] = total[offset:end, end:].T
        offset = end
    return total
