"""Attention over each session's exact tokens and its log-sum (reference: `tail_attention_plainly` in
`decode_plainly.py`), and the place of a new token.

Both the tokens that a document keeps exact and the session's tail behind them are attended to always.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xkv_service.kernels.factor_rows import KERNEL_TYPES
from xkv_service.kernels.product import product
from xkv_service.kernels.tail_table import TailTable


@triton.jit  # type: ignore[untyped-decorator]
def _at(addresses, session, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The beginning of a session's tensor."""
    return tl.load(addresses + session).to(tl.pointer_type(DTYPE))


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    queries, key, value, inside, peak, total, result, scaling, ROWS: tl.constexpr, SIZE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over one tile more: key [DIM, SIZE] and value [SIZE, VALUE_DIM]."""
    score = product(queries, key, tl.full((ROWS, SIZE), 0, tl.float32), PRECISION) * scaling
    score = tl.where(inside[None, :], score, -float("inf"))
    higher = tl.maximum(peak, tl.max(score, axis=1))
    weight = tl.exp(score - higher[:, None])
    shrink = tl.exp(peak - higher)
    total = total * shrink + tl.sum(weight, axis=1)
    return higher, total, product(weight.to(DTYPE), value, result * shrink[:, None], PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _tail(  # type: ignore[no-untyped-def]
    query, addresses, sizes, lengths, out, log, scaling, width, HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, dim, value_dim = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    line = (session * HEADS + head) * GROUP + row
    there = row < GROUP
    queries = tl.load(query + line[:, None] * DIM + dim[None, :], mask=there[:, None], other=0.0).to(DTYPE)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.full((ROWS,), 0, tl.float32)
    result = tl.full((ROWS, VALUE_DIM), 0, tl.float32)
    for part in tl.static_range(2):  # exact tokens [e, HEADS, DIM], then the tail [HEADS, room, DIM]
        keys = _at(addresses + (2 * part) * width, session, DTYPE)
        values = _at(addresses + (2 * part + 1) * width, session, DTYPE)
        if part == 0:
            length, start, apart = tl.load(sizes + session), head.to(tl.int64), HEADS
        else:
            length, apart = tl.load(lengths + session), 1
            start = head.to(tl.int64) * tl.load(sizes + width + session)
        for first in range(0, length, SIZE):
            place = first + tl.arange(0, SIZE)
            inside = place < length
            at = start + place * apart
            key_at = tl.multiple_of(keys + at[None, :] * DIM + dim[:, None], [16, 16])
            value_at = tl.multiple_of(values + at[:, None] * VALUE_DIM + value_dim[None, :], [16, 16])
            key = tl.load(key_at, mask=inside[None, :], other=0.0)
            value = tl.load(value_at, mask=inside[:, None], other=0.0)
            peak, total, result = _attend(
                queries, key, value, inside, peak, total, result, scaling, ROWS, SIZE, DTYPE, PRECISION
            )
    some = total > 0
    safe = tl.where(some, total, 1.0)
    target = out + line[:, None] * VALUE_DIM + value_dim[None, :]
    tl.store(target, result / safe[:, None], mask=there[:, None])
    tl.store(log + line, tl.where(some, peak + tl.log(safe), -3.0e38), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _append(  # type: ignore[no-untyped-def]
    keys, values, key_session, key_head, value_session, value_head, addresses, sizes, counts, width,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    head, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(counts + session)
    if count < 0:
        return
    row = head.to(tl.int64) * tl.load(sizes + width + session) + count
    dim, value_dim = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    key = tl.load(keys + session * key_session + head * key_head + dim)
    value = tl.load(values + session * value_session + head * value_head + value_dim)
    tl.store(_at(addresses + 2 * width, session, DTYPE) + row * DIM + dim, key.to(DTYPE))
    target = _at(addresses + 3 * width, session, DTYPE) + row * VALUE_DIM + value_dim
    tl.store(target, value.to(DTYPE))


def tail_attention(
    query: torch.Tensor, tails: TailTable, lengths: torch.Tensor, out: torch.Tensor, log: torch.Tensor,
    scaling: float, *, size: int = 64, warps: int = 4,
) -> None:  # fmt: skip
    """Write attention over every session's exact tokens and the first tokens of its tail.

    Args:
        query: [sessions, query_heads, D], rotated, contiguous. lengths: int32 [sessions], tokens of tails.
        out: float32 [sessions, query_heads, Dv]. log: float32 [sessions, query_heads], the log of the sum of
            exponentials of the scores; -3e38 where there is no token.
        size: tokens of a tile.
    """
    group = query.shape[1] // tails.heads
    _tail[tails.heads, tails.sessions](
        query, tails.addresses, tails.sizes, lengths, out, log, scaling, tails.width, HEADS=tails.heads,
        GROUP=group, DIM=tails.dim, VALUE_DIM=tails.value_dim, ROWS=max(16, triton.next_power_of_2(group)),
        SIZE=size, DTYPE=KERNEL_TYPES[tails.dtype],
        PRECISION="ieee" if tails.dtype == torch.float32 else "tf32", num_warps=warps,
    )  # fmt: skip


def append_token(keys: torch.Tensor, values: torch.Tensor, tails: TailTable, counts: torch.Tensor) -> None:
    """Write a new token of every session into the room behind its tail.

    Args:
        keys, values: [sessions, kv_heads, D] and [..., Dv], keys rotated; numbers of a head contiguous.
        counts: int32 [sessions], tokens of each tail; below zero: the session has no new token.
    """
    if keys.stride(2) != 1 or values.stride(2) != 1:
        raise ValueError("the numbers of a head stand one behind the other")
    _append[tails.heads, tails.sessions](
        keys, values, *keys.stride()[:2], *values.stride()[:2], tails.addresses, tails.sizes, counts,
        tails.width, DIM=tails.dim, VALUE_DIM=tails.value_dim, DTYPE=KERNEL_TYPES[tails.dtype], num_warps=1,
    )  # fmt: skip
