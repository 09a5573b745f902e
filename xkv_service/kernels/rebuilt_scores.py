"""Attention scores of chosen tokens from their token factors (reference: `rebuilt_scores_plainly` in
`decode_plainly.py`).

A program gathers a block of rows of A, multiplies them with the bases of one or a few KV heads, turns the
keys in registers by the tokens' own angles, and multiplies them with the session's queries. Rebuilt keys
never reach memory. Programs of one block's KV heads stand next to each other in the grid, so that all but one
find its rows in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.factor_rows import (
    KERNEL_TYPES,
    SHAPE,
    column_counts,
    packed_columns,
    row_offsets,
    whole_columns,
)
from xkv_service.kernels.product import product


@triton.jit  # type: ignore[untyped-decorator]
def _added(  # type: ignore[no-untyped-def]
    keys, columns, first, count, bases, scales, BASE_STRIDE: tl.constexpr, DTYPE: tl.constexpr,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """keys + columns · bases[first : first + STEP], rows from `count` on left out."""
    row = first + tl.arange(0, STEP)
    if SCALED:
        scale = tl.load(scales + row, mask=row < count, other=0.0)
        columns = (columns.to(tl.float32) * scale.to(tl.float32)[None, :]).to(DTYPE)
    source = bases + row[:, None] * BASE_STRIDE + tl.arange(0, WIDTH)[None, :]
    part = tl.load(tl.multiple_of(source, [16, 16]), mask=(row < count)[:, None], other=0.0)
    return product(columns, part, keys, PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _rebuilt(  # type: ignore[no-untyped-def]
    rows_at, position, whole, four, two, bases, scales, BASE_STRIDE: tl.constexpr, DTYPE: tl.constexpr,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr, FOUR: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Keys before RoPE, float32 [SLOTS, WIDTH], of tokens int64 [SLOTS] of the document at `rows_at`."""
    at_four, at_two, stride = row_offsets(whole, four, two, WHOLE_BYTES)
    rows = rows_at + position[:, None] * stride
    keys = tl.full((SLOTS, WIDTH), 0, tl.float32)
    for first in range(0, whole, STEP):
        columns = whole_columns(rows, first, whole, DTYPE, WHOLE, WHOLE_BYTES, STEP)
        keys = _added(
            keys, columns, first, whole, bases, scales, BASE_STRIDE, DTYPE, SCALED, WIDTH, STEP, PRECISION
        )
    if FOUR:
        bases, scales = bases + whole * BASE_STRIDE, scales + whole
        for first in range(0, four, STEP):
            columns = packed_columns(rows + at_four, first, four, DTYPE, 4, STEP)
            keys = _added(
                keys, columns, first, four, bases, scales, BASE_STRIDE, DTYPE, SCALED, WIDTH, STEP, PRECISION
            )
        bases, scales = bases + four * BASE_STRIDE, scales + four
    elif TWO:
        bases, scales = bases + whole * BASE_STRIDE, scales + whole
    if TWO:
        for first in range(0, two, STEP):
            columns = packed_columns(rows + at_two, first, two, DTYPE, 2, STEP)
            keys = _added(
                keys, columns, first, two, bases, scales, BASE_STRIDE, DTYPE, SCALED, WIDTH, STEP, PRECISION
            )
    return keys


@triton.jit  # type: ignore[untyped-decorator]
def _rebuilt_scores(  # type: ignore[no-untyped-def]
    query, positions, counts, rows_at, bases_at, scales_at, shapes, cos, sin, scores, scaling, most,
    HEADS: tl.constexpr, GROUP: tl.constexpr, INTERLEAVED: tl.constexpr,
    QUERIES: tl.constexpr, TOGETHER: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr,
    BASE_STRIDE: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr, FOUR: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    first_head, block, session = (
        tl.program_id(0) * TOGETHER,
        tl.program_id(1),
        tl.program_id(2).to(tl.int64),
    )
    count = tl.load(counts + session)
    if block * SLOTS >= count:
        return
    slot = block * SLOTS + tl.arange(0, SLOTS)
    position = tl.load(positions + session * most + slot, mask=slot < count, other=0).to(tl.int64)
    whole, four, two = column_counts(shapes + session * SHAPE)
    bases = tl.load(bases_at + session).to(tl.pointer_type(DTYPE)) + first_head * DIM
    scales = tl.load(scales_at + session).to(tl.pointer_type(DTYPE))
    keys = _rebuilt(
        tl.load(rows_at + session), position, whole, four, two, bases, scales, BASE_STRIDE, DTYPE,
        SCALED, TOGETHER * DIM, SLOTS, STEP, PRECISION, WHOLE, WHOLE_BYTES, FOUR, TWO,
    )  # fmt: skip
    half: tl.constexpr = DIM // 2
    halves: tl.constexpr = TOGETHER * half
    if INTERLEAVED:
        x, y = tl.split(tl.reshape(keys, (SLOTS, halves, 2)))
    else:
        x, y = tl.split(tl.permute(tl.reshape(keys, (SLOTS, TOGETHER, 2, half)), (0, 1, 3, 2)))
        x, y = tl.reshape(x, (SLOTS, halves)), tl.reshape(y, (SLOTS, halves))
    plane = tl.arange(0, halves) % half
    angle = position[:, None] * half + plane[None, :]
    c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
    turned_x, turned_y = (x * c - y * s).to(DTYPE), (y * c + x * s).to(DTYPE)
    column = tl.arange(0, QUERIES)
    step: tl.constexpr = 1 if INTERLEAVED else half
    dim = plane * (2 if INTERLEAVED else 1)
    there = column < TOGETHER * GROUP
    row = (session * HEADS + first_head) * GROUP + column
    mine = there[None, :] & (tl.arange(0, halves)[:, None] // half == (column // GROUP)[None, :])
    source = query + row[None, :] * DIM + dim[:, None]
    left = tl.load(source, mask=mine, other=0.0).to(DTYPE)
    right = tl.load(source + step, mask=mine, other=0.0).to(DTYPE)
    found = product(turned_x, left, tl.full((SLOTS, QUERIES), 0, tl.float32), PRECISION)
    found = product(turned_y, right, found, PRECISION)
    found = tl.where((slot < count)[:, None], found * scaling, -float("inf"))
    target = scores + row[None, :] * most + slot[:, None]
    tl.store(target, found, mask=there[None, :] & (slot < most)[:, None])


def rebuilt_scores(
    query: torch.Tensor, chosen: Any, table: Any, turns: tuple[torch.Tensor, torch.Tensor],
    scores: torch.Tensor, scaling: float, *, interleaved: bool = False, slots: int = 64, step: int = 64,
    together: int = 2, warps: int = 4, stages: int = 3,
) -> None:  # fmt: skip
    """Write scores of chosen tokens.

    Args:
        query: [sessions, query_heads, D], rotated, contiguous. chosen: a `ChooseTokens`. table: the layer's
            `DocumentTable`. turns: cos and sin [positions, D / 2], contiguous, of every position.
        scores: float32 [sessions, query_heads, most]: written up to the count of each session, rounded up
            to `slots`, minus infinity behind it.
        interleaved: planes are dimensions 2 i and 2 i + 1, not i and i + D / 2.
        slots, step, together: tokens, ranks and KV heads of a tile. warps, stages: warps;
            loads in flight.
    """
    sessions, query_heads, dim = query.shape
    heads = table.kv_heads
    group = query_heads // heads
    if heads % together:
        together = 1
    _rebuilt_scores[heads // together, triton.cdiv(chosen.most, slots), sessions](
        query, chosen.positions, chosen.counts, table.key_rows, table.key_bases, table.key_scales,
        table.key_shapes, *turns, scores, scaling, chosen.most, HEADS=heads, GROUP=group,
        INTERLEAVED=interleaved, QUERIES=max(16, triton.next_power_of_2(together * group)), TOGETHER=together,
        DTYPE=KERNEL_TYPES[table.dtype], SCALED=table.key_scaled, BASE_STRIDE=table.key_stride,
        DIM=dim, SLOTS=slots, STEP=step,
        PRECISION="ieee" if table.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
        **table.key_widths,
    )  # fmt: skip
