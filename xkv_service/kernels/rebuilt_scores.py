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
    every,
    row_offsets,
    scaled,
    sixteen_bits,
    whole_columns,
)
from xkv_service.kernels.product import product


@triton.jit  # type: ignore[untyped-decorator]
def _added(  # type: ignore[no-untyped-def]
    keys, columns, first, row, count, bases, scales, BASE_STRIDE: tl.constexpr, DTYPE: tl.constexpr,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """keys + columns · bases[first + row], rows from `count` on left out: there are none where it is FULL.

    `first` goes into a pointer: what is added to it then is known when it is compiled.
    """
    bases, scales, count = bases + first * BASE_STRIDE, scales + first, count - first
    if SCALED:
        scale = tl.load(scales + row) if FULL else tl.load(scales + row, mask=row < count, other=0.0)
        columns = scaled(columns, scale[None, :], DTYPE)
    source = bases + (row[:, None] * BASE_STRIDE + tl.arange(0, WIDTH)[None, :])
    source = tl.multiple_of(source, [16, 16])
    part = tl.load(source) if FULL else tl.load(source, mask=(row < count)[:, None], other=0.0)
    return product(columns, part, keys, PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    keys, rows, first, count, bases, scales, BITS: tl.constexpr, BASE_STRIDE: tl.constexpr,
    DTYPE: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr, FULL: tl.constexpr, WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr,
):  # fmt: skip
    """keys + STEP columns of BITS bits (16: whole numbers of another dtype than int8) · their bases."""
    if BITS == 16:
        columns = whole_columns(rows, first, count, DTYPE, WHOLE, WHOLE_BYTES, STEP, FULL)
        return _added(
            keys, columns, first, tl.arange(0, STEP), count, bases, scales, BASE_STRIDE, DTYPE, SCALED, WIDTH,
            PRECISION, FULL,
        )  # fmt: skip
    each: tl.constexpr = 16 // BITS
    parts: tl.constexpr = each // 4 if each > 4 else 1  # of 2 bits a step takes half of twice as many columns
    begin = first // (STEP * parts) * (STEP * parts)
    sixteen = sixteen_bits(rows, begin, count, BITS, STEP * parts, FULL)
    if parts == 2:
        second = first // STEP % 2
        sixteen = tl.where(second == 1, sixteen >> 8, sixteen)
        begin += second * 4
    for place in tl.static_range(each // parts):
        row = tl.arange(0, STEP * parts // each) * each + place
        keys = _added(
            keys, every(sixteen, place, BITS, DTYPE), begin, row, count, bases, scales, BASE_STRIDE, DTYPE,
            SCALED, WIDTH, PRECISION, FULL,
        )  # fmt: skip
    return keys


@triton.jit  # type: ignore[untyped-decorator]
def _run(  # type: ignore[no-untyped-def]
    keys, rows, count, bases, scales, BITS: tl.constexpr, BASE_STRIDE: tl.constexpr, DTYPE: tl.constexpr,
    SCALED: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr,
):  # fmt: skip
    """keys + all columns of one width · bases: full steps without masks, then what is left with them."""
    block: tl.constexpr = 2 * STEP if BITS == 2 else STEP
    full = count // block * block
    for first in range(0, full, STEP):
        keys = _step(
            keys, rows, first, count, bases, scales, BITS, BASE_STRIDE, DTYPE, SCALED, WIDTH, STEP, PRECISION,
            True, WHOLE, WHOLE_BYTES,
        )  # fmt: skip
    for first in range(full, (count + block - 1) // block * block, STEP):
        keys = _step(
            keys, rows, first, count, bases, scales, BITS, BASE_STRIDE, DTYPE, SCALED, WIDTH, STEP, PRECISION,
            False, WHOLE, WHOLE_BYTES,
        )  # fmt: skip
    return keys


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
    keys = _run(
        keys, rows, whole, bases, scales, 8 if tl.int8 == WHOLE else 16, BASE_STRIDE, DTYPE, SCALED, WIDTH,
        STEP, PRECISION, WHOLE, WHOLE_BYTES,
    )  # fmt: skip
    if FOUR:
        bases, scales = bases + whole * BASE_STRIDE, scales + whole
        keys = _run(
            keys, rows + at_four, four, bases, scales, 4, BASE_STRIDE, DTYPE, SCALED, WIDTH, 64, PRECISION,
            WHOLE, WHOLE_BYTES,
        )  # fmt: skip
        bases, scales = bases + four * BASE_STRIDE, scales + four
    elif TWO:
        bases, scales = bases + whole * BASE_STRIDE, scales + whole
    if TWO:
        keys = _run(
            keys, rows + at_two, two, bases, scales, 2, BASE_STRIDE, DTYPE, SCALED, WIDTH, 64, PRECISION,
            WHOLE, WHOLE_BYTES,
        )  # fmt: skip
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
        slots, step, together: tokens, ranks and KV heads of a tile; of packed columns a tile has 64. warps,
            stages: warps; loads in flight.

    Raises:
        ValueError: a step below 32, of which a product would have fewer than 16.
    """
    if step < 32:
        raise ValueError(f"step={step}: two columns are read at once, and a product takes 16 of each")
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
