"""From partial sums in latent space to a layer's output (reference: `projected_output_plainly` in
`decode_plainly.py`).

Merges the parts of the budget and what was attended to besides (exact tokens and tail) by the logarithms of
their sums, and multiplies the latent once with the layer bases of values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.factor_rows import KERNEL_TYPES, SHAPE, column_counts
from xkv_service.kernels.product import product


@triton.jit  # type: ignore[untyped-decorator]
def _projected(  # type: ignore[no-untyped-def]
    latents, peaks, sums, rest, rest_log, bases_at, scales_at, shapes, out, room, HEADS: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr,
    ROW_STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, piece, session = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    there = row < GROUP
    query_head = head * GROUP + row
    query_heads: tl.constexpr = HEADS * GROUP
    line = session * query_heads + query_head
    log = tl.load(rest_log + line, mask=there, other=0.0)
    highest = log
    for split in tl.static_range(SPLITS):
        place = (session * SPLITS + split) * query_heads + query_head
        highest = tl.maximum(highest, tl.load(peaks + place, mask=there, other=-float("inf")))
    total = tl.exp(log - highest)
    for split in tl.static_range(SPLITS):
        place = (session * SPLITS + split) * query_heads + query_head
        peak = tl.load(peaks + place, mask=there, other=-float("inf"))
        total += tl.load(sums + place, mask=there, other=0.0) * tl.exp(peak - highest)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    beside = rest + line[:, None] * DIM + column[None, :]
    result = tl.load(beside, mask=there[:, None], other=0.0) * (tl.exp(log - highest) / total)[:, None]
    shape = shapes + session * SHAPE
    whole, four, two = column_counts(shape)
    ranks = whole + four + two
    bases = tl.load(bases_at + session).to(tl.pointer_type(DTYPE)) + head * tl.load(shape + 3)
    scales = tl.load(scales_at + session).to(tl.pointer_type(DTYPE))
    for first in range(0, ranks, STEP):
        rank = first + tl.arange(0, STEP)
        latent = tl.full((ROWS, STEP), 0, tl.float32)
        for split in tl.static_range(SPLITS):
            place = (session * SPLITS + split) * query_heads + query_head
            part = tl.exp(tl.load(peaks + place, mask=there, other=-float("inf")) - highest) / total
            partial = latents + place[:, None] * room + rank[None, :]
            latent += tl.load(partial, mask=there[:, None], other=0.0) * part[:, None]
        latent = tl.where(
            (rank < ranks)[None, :], latent, 0.0
        )  # behind its rank a session has written nothing
        if SCALED:
            latent = latent * tl.load(scales + rank, mask=rank < ranks, other=0.0).to(tl.float32)[None, :]
        source = tl.multiple_of(bases + rank[:, None] * ROW_STRIDE + column[None, :], [16, 16])
        base = tl.load(source, mask=(rank < ranks)[:, None], other=0.0)
        result = product(latent.to(DTYPE), base, result, PRECISION)
    tl.store(out + line[:, None] * DIM + column[None, :], result, mask=there[:, None])


def projected_output(
    values: Any, rest: torch.Tensor, rest_log: torch.Tensor, table: Any, out: torch.Tensor, *,
    columns: int = 64, step: int = 64, warps: int = 2, stages: int = 3,
) -> None:  # fmt: skip
    """Write a layer's attention.

    Args:
        values: a `LatentValues` that was filled. rest: float32 [sessions, query_heads, Dv], attention over
            everything but the chosen tokens; rest_log: float32 [sessions, query_heads], the log of the sum
            of exponentials of its scores. table: the layer's `DocumentTable`.
        out: [sessions, query_heads, Dv], contiguous, any float dtype.
        columns, step: output dimensions and ranks of a tile.

    Raises:
        ValueError: partial sums are no multiple of `step`: the last tile would be read beyond their end.
    """
    if values.latents.shape[3] % step:
        raise ValueError(f"step={step} does not divide {values.latents.shape[3]} columns of partial sums")
    heads, dim = table.kv_heads, out.shape[2]
    group = out.shape[1] // heads
    columns = min(columns, dim)
    _projected[heads, dim // columns, out.shape[0]](
        values.latents, values.peaks, values.sums, rest, rest_log, table.value_bases, table.value_scales,
        table.value_shapes, out, values.latents.shape[3], HEADS=heads, GROUP=group, SPLITS=values.splits,
        DIM=dim, COLUMNS=columns, ROWS=max(16, triton.next_power_of_2(group)), STEP=step,
        DTYPE=KERNEL_TYPES[table.dtype], SCALED=table.value_scaled, ROW_STRIDE=table.value_stride,
        PRECISION="ieee" if table.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
