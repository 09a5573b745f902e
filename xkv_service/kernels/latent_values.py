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

from xkv_service.kernels.factor_rows import KERNEL_TYPES, packed_columns, whole_columns
from xkv_service.kernels.product import product


@triton.jit  # type: ignore[untyped-decorator]
def _store_weighted(  # type: ignore[no-untyped-def]
    scores, positions, base, count, line, there, place, piece, latents, peaks, sums, most, BITS: tl.constexpr,
    SKIPPED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    RANK: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr, FOUR_COLUMNS: tl.constexpr, FOUR_OFFSET: tl.constexpr,
    TWO_COLUMNS: tl.constexpr, TWO_OFFSET: tl.constexpr,
):  # fmt: skip
    """Weights times one piece of the columns of one width (8 stands for whole numbers of any width)."""
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.full((ROWS,), 0, tl.float32)
    latent = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for first in range(tl.program_id(1) * SLOTS, count, SPLITS * SLOTS):
        slot = first + tl.arange(0, SLOTS)
        position = tl.load(positions + slot, mask=slot < count, other=0).to(tl.int64)
        rows = base + position[:, None] * STRIDE
        if BITS == 8:
            part = whole_columns(
                rows, piece * COLUMNS, DTYPE, STRIDE, WHOLE, WHOLE_BYTES, WHOLE_COLUMNS, COLUMNS
            )
        elif BITS == 4:
            part = packed_columns(rows, piece * COLUMNS, DTYPE, 4, FOUR_OFFSET, FOUR_COLUMNS, COLUMNS)
        else:
            part = packed_columns(rows, piece * COLUMNS, DTYPE, 2, TWO_OFFSET, TWO_COLUMNS, COLUMNS)
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
    target = latents + place[:, None] * RANK + (SKIPPED + column)[None, :]
    tl.store(target, latent, mask=there[:, None] & (column < WIDTH)[None, :])
    if tl.program_id(0) == 0:
        tl.store(peaks + place, peak, mask=there)
        tl.store(sums + place, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _latent_values(  # type: ignore[no-untyped-def]
    scores, positions, counts, rows_at, latents, peaks, sums, most, ROWS: tl.constexpr,
    QUERY_HEADS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, STRIDE: tl.constexpr,
    WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, FOUR_COLUMNS: tl.constexpr,
    FOUR_OFFSET: tl.constexpr, TWO_COLUMNS: tl.constexpr, TWO_OFFSET: tl.constexpr,
):  # fmt: skip
    piece, session = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    there = row < QUERY_HEADS
    line = session * QUERY_HEADS + row
    place = (session * SPLITS + tl.program_id(1)) * QUERY_HEADS + row
    count, base = tl.load(counts + session), tl.load(rows_at + session)
    listed = positions + session * most
    four: tl.constexpr = (WHOLE_COLUMNS + COLUMNS - 1) // COLUMNS
    two: tl.constexpr = four + (FOUR_COLUMNS + COLUMNS - 1) // COLUMNS
    if WHOLE_COLUMNS > 0:  # noqa: SIM102, decided when it is compiled
        if piece < four:
            _store_weighted(
                scores, listed, base, count, line, there, place, piece, latents, peaks, sums, most, 8, 0,
                WHOLE_COLUMNS, ROWS, SPLITS, COLUMNS, SLOTS, DTYPE, PRECISION, RANK, STRIDE, WHOLE,
                WHOLE_BYTES, WHOLE_COLUMNS, FOUR_COLUMNS, FOUR_OFFSET, TWO_COLUMNS, TWO_OFFSET,
            )  # fmt: skip
    if FOUR_COLUMNS > 0:  # noqa: SIM102, decided when it is compiled
        if (piece >= four) & (piece < two):
            _store_weighted(
                scores, listed, base, count, line, there, place, piece - four, latents, peaks, sums, most, 4,
                WHOLE_COLUMNS, FOUR_COLUMNS, ROWS, SPLITS, COLUMNS, SLOTS, DTYPE, PRECISION, RANK, STRIDE,
                WHOLE, WHOLE_BYTES, WHOLE_COLUMNS, FOUR_COLUMNS, FOUR_OFFSET, TWO_COLUMNS, TWO_OFFSET,
            )  # fmt: skip
    if TWO_COLUMNS > 0:  # noqa: SIM102, decided when it is compiled
        if piece >= two:
            _store_weighted(
                scores, listed, base, count, line, there, place, piece - two, latents, peaks, sums, most, 2,
                WHOLE_COLUMNS + FOUR_COLUMNS, TWO_COLUMNS, ROWS, SPLITS, COLUMNS, SLOTS, DTYPE, PRECISION,
                RANK, STRIDE, WHOLE, WHOLE_BYTES, WHOLE_COLUMNS, FOUR_COLUMNS, FOUR_OFFSET, TWO_COLUMNS,
                TWO_OFFSET,
            )  # fmt: skip


class LatentValues:
    """Partial sums of one batch of sessions, in memory that is taken once.

    Args:
        sessions, query_heads: of the batch. rank: of the values. splits: of the budget.

    Attributes:
        latents: float32 [sessions, splits, query_heads, rank], sums of exp(score - peak) times rows of A_v.
        peaks, sums: float32 [sessions, splits, query_heads], the largest score, and the sum of the weights.
    """

    def __init__(
        self, sessions: int, query_heads: int, rank: int, device: torch.device, *, splits: int = 4
    ) -> None:
        self.splits = splits
        self.latents = torch.empty(sessions, splits, query_heads, rank, device=device)
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
        """
        sessions, query_heads, _ = scores.shape
        layout = table.value_layout
        counts = (layout.whole_columns, layout.four_columns, layout.two_columns)
        pieces = sum(triton.cdiv(count, columns) for count in counts)
        _latent_values[pieces, self.splits, sessions](
            scores, chosen.positions, chosen.counts, table.value_rows, self.latents, self.peaks, self.sums,
            chosen.most, ROWS=max(16, triton.next_power_of_2(query_heads)), QUERY_HEADS=query_heads,
            SPLITS=self.splits, COLUMNS=columns, SLOTS=slots, DTYPE=KERNEL_TYPES[table.dtype],
            PRECISION="ieee" if table.dtype == torch.float32 else "tf32", RANK=layout.rank, num_warps=warps,
            num_stages=stages, **layout.arguments,
        )  # fmt: skip
