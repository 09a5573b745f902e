"""Softmax over chosen tokens and their values in latent space (reference: `latent_values_plainly` in
`decode_plainly.py`).

With p a row of weights, p A_v needs the token factors of values once for all heads; the layer bases come
after it (`projected_output.py`). The budget is split over programs; each leaves the sum of its weights, their
peak and the weighted sum of rows, which are merged later by their logarithms (flash decoding).
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

ROOM = 64
"""Columns of partial sums are a multiple, which `projected_output` reads at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _store_weighted(  # type: ignore[no-untyped-def]
    scores, positions, base, stride, count, line, there, place, piece, columns, skipped, latents, peaks, sums,
    most, room, BITS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
):  # fmt: skip
    """Weights times one piece of the `columns` of one width (8 stands for whole numbers of any width).

    `base` is where the first row has them; `skipped` columns of the latent stand before them.
    """
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.full((ROWS,), 0, tl.float32)
    latent = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for first in range(tl.program_id(1) * SLOTS, count, SPLITS * SLOTS):
        slot = first + tl.arange(0, SLOTS)
        position = tl.load(positions + slot, mask=slot < count, other=0).to(tl.int64)
        rows = base + position[:, None] * stride
        if BITS == 8:
            part = whole_columns(rows, piece * COLUMNS, columns, DTYPE, WHOLE, WHOLE_BYTES, COLUMNS, False)
        else:
            part = packed_columns(rows, piece * COLUMNS, columns, DTYPE, BITS, COLUMNS)
        source = scores + line[:, None] * most + slot[None, :]
        score = tl.load(source, mask=there[:, None] & (slot < count)[None, :], other=-float("inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp(peak - safe)
        weight = tl.exp(score - safe[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        peak = higher
        latent = product(weight.to(DTYPE), part, latent * shrink[:, None], PRECISION)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    target = latents + place[:, None] * room + (skipped + column)[None, :]
    tl.store(target, latent, mask=there[:, None] & (column < columns)[None, :])
    if tl.program_id(0) == 0:
        tl.store(peaks + place, peak, mask=there)
        tl.store(sums + place, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _latent_values(  # type: ignore[no-untyped-def]
    scores, positions, counts, rows_at, shapes, latents, peaks, sums, most, room, ROWS: tl.constexpr,
    QUERY_HEADS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr,
    FOUR: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    piece, session = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    there = row < QUERY_HEADS
    line = session * QUERY_HEADS + row
    place = (session * SPLITS + tl.program_id(1)) * QUERY_HEADS + row
    count, base = tl.load(counts + session), tl.load(rows_at + session)
    listed = positions + session * most
    whole, four, two = column_counts(shapes + session * SHAPE)
    at_four, at_two, stride = row_offsets(whole, four, two, WHOLE_BYTES)
    first_four = (whole + COLUMNS - 1) // COLUMNS
    first_two = first_four + (four + COLUMNS - 1) // COLUMNS
    end = first_two + (two + COLUMNS - 1) // COLUMNS
    if piece < first_four:
        _store_weighted(
            scores, listed, base, stride, count, line, there, place, piece, whole, 0, latents, peaks, sums,
            most, room, 8, ROWS, SPLITS, COLUMNS, SLOTS, DTYPE, PRECISION, WHOLE, WHOLE_BYTES,
        )  # fmt: skip
    if FOUR:  # noqa: SIM102, decided when it is compiled
        if (piece >= first_four) & (piece < first_two):
            _store_weighted(
                scores, listed, base + at_four, stride, count, line, there, place, piece - first_four, four,
                whole, latents, peaks, sums, most, room, 4, ROWS, SPLITS, COLUMNS, SLOTS, DTYPE, PRECISION,
                WHOLE, WHOLE_BYTES,
            )  # fmt: skip
    if TWO:  # noqa: SIM102, decided when it is compiled
        if (piece >= first_two) & (piece < end):
            _store_weighted(
                scores, listed, base + at_two, stride, count, line, there, place, piece - first_two, two,
                whole + four, latents, peaks, sums, most, room, 2, ROWS, SPLITS, COLUMNS, SLOTS, DTYPE,
                PRECISION, WHOLE, WHOLE_BYTES,
            )  # fmt: skip


class LatentValues:
    """Partial sums of one batch of sessions, in memory that is taken once.

    Args:
        sessions, query_heads: of the batch. rank: most of a document's values. splits: of the budget.

    Attributes:
        latents: float32 [sessions, splits, query_heads, room], sums of exp(score - peak) times rows of A_v.
            room is the rank rounded up to `ROOM`; nothing is written behind a document's own rank.
        peaks, sums: float32 [sessions, splits, query_heads], the largest score, and the sum of the weights.
    """

    def __init__(
        self, sessions: int, query_heads: int, rank: int, device: torch.device, *, splits: int = 4
    ) -> None:
        self.splits = splits
        self.latents = torch.empty(sessions, splits, query_heads, -(-rank // ROOM) * ROOM, device=device)
        self.peaks = torch.empty(sessions, splits, query_heads, device=device)
        self.sums = torch.empty_like(self.peaks)

    def __call__(
        self, scores: torch.Tensor, chosen: Any, table: Any, *, slots: int = 64, columns: int = 128,
        warps: int = 4, stages: int = 2,
    ) -> None:  # fmt: skip
        """Fill the sums.

        Args:
            scores: as `rebuilt_scores` wrote them. chosen: a `ChooseTokens`. table: a `DocumentTable`.
            slots, columns: tokens and columns of a tile.

        Raises:
            ValueError: fewer than 32 tokens: with 16 the code that Triton 3.6 makes for packed columns in
                bfloat16 is wrong (H100).
        """
        if slots < 32:
            raise ValueError(f"slots={slots}: latent values are summed wrongly over fewer than 32 tokens")
        sessions, query_heads, _ = scores.shape
        room, widths = self.latents.shape[3], table.value_widths
        pieces = triton.cdiv(room, columns) + widths["FOUR"] + widths["TWO"]  # each width's last may be short
        _latent_values[pieces, self.splits, sessions](
            scores, chosen.positions, chosen.counts, table.value_rows, table.value_shapes, self.latents,
            self.peaks, self.sums, chosen.most, room, ROWS=max(16, triton.next_power_of_2(query_heads)),
            QUERY_HEADS=query_heads, SPLITS=self.splits, COLUMNS=columns, SLOTS=slots,
            DTYPE=KERNEL_TYPES[table.dtype],
            PRECISION="ieee" if table.dtype == torch.float32 else "tf32", num_warps=warps,
            num_stages=stages, **widths,
        )  # fmt: skip
