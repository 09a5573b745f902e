"""Attention over each session's exact tokens and its log-sum (reference: `tail_attention_plainly` in
`decode_plainly.py`).

A session's tail begins with the tokens that its document keeps exact; both are attended to always.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xkv_service.kernels.factor_rows import KERNEL_TYPES
from xkv_service.kernels.product import product


@triton.jit  # type: ignore[untyped-decorator]
def _tail(  # type: ignore[no-untyped-def]
    query, keys, values, lengths, out, log, scaling, capacity, HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + session)
    row, dim, value_dim = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    line = (session * HEADS + head) * GROUP + row
    there = row < GROUP
    queries = tl.load(query + line[:, None] * DIM + dim[None, :], mask=there[:, None], other=0.0).to(DTYPE)
    start = (session * HEADS + head) * capacity
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.full((ROWS,), 0, tl.float32)
    result = tl.full((ROWS, VALUE_DIM), 0, tl.float32)
    for first in range(0, length, SIZE):
        place = first + tl.arange(0, SIZE)
        inside = place < length
        key = tl.load(keys + (start + place)[None, :] * DIM + dim[:, None], mask=inside[None, :], other=0.0)
        score = product(queries, key, tl.full((ROWS, SIZE), 0, tl.float32), PRECISION) * scaling
        score = tl.where(inside[None, :], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        value = tl.load(
            values + (start + place)[:, None] * VALUE_DIM + value_dim[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        result = product(weight.to(DTYPE), value, result * shrink[:, None], PRECISION)
        peak = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    target = out + line[:, None] * VALUE_DIM + value_dim[None, :]
    tl.store(target, result / safe[:, None], mask=there[:, None])
    tl.store(log + line, tl.where(some, peak + tl.log(safe), -3.0e38), mask=there)


def tail_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor,
    log: torch.Tensor, scaling: float, *, size: int = 64, warps: int = 4,
) -> None:  # fmt: skip
    """Write attention over the first tokens of every session's tail.

    Args:
        query: [sessions, query_heads, D], rotated, contiguous. keys, values: [sessions, kv_heads, capacity,
            D] and [..., Dv], keys rotated, contiguous. lengths: int32 [sessions], tokens there.
        out: float32 [sessions, query_heads, Dv]. log: float32 [sessions, query_heads], the log of the sum of
            exponentials of the scores; -3e38 where there is no token.
        size: tokens of a tile.
    """
    sessions, heads, capacity, dim = keys.shape
    group = query.shape[1] // heads
    _tail[heads, sessions](
        query, keys, values, lengths, out, log, scaling, capacity, HEADS=heads, GROUP=group, DIM=dim,
        VALUE_DIM=values.shape[3], ROWS=max(16, triton.next_power_of_2(group)), SIZE=size,
        DTYPE=KERNEL_TYPES[keys.dtype], PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
        num_warps=warps,
    )  # fmt: skip
