"""What the shares of each head are of: everything that it sees, from the sums of blocks of an index."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def share_totals(  # type: ignore[no-untyped-def]
    peaks, sums, others, lengths, totals, blocks, ROWS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One session's totals [ROWS], logarithms in bits.

    Args:
        peaks, sums: [sessions, blocks, ROWS], the largest score of each block of `BLOCK` tokens, in bits, and
            the sum of the powers of 2 below it. others: [sessions, ROWS], log-sums of all else.
    """
    session = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + session)
    row = tl.arange(0, PADDED)
    best = tl.load(others + session * ROWS + row, mask=row < ROWS, other=0.0) * 1.4426950408889634
    total = tl.full((PADDED,), 1.0, tl.float32)
    for start in range(0, (length + BLOCK - 1) // BLOCK, SIZE):
        block = start + tl.arange(0, SIZE)[:, None]
        there = (block * BLOCK < length) & (row[None, :] < ROWS)
        place = (session * blocks + block) * ROWS + row[None, :]
        peak = tl.load(peaks + place, mask=there, other=-float("inf"))
        part = tl.load(sums + place, mask=there, other=0.0)
        higher = tl.maximum(best, tl.max(peak, axis=0))
        total = total * tl.exp2(best - higher) + tl.sum(part * tl.exp2(peak - higher[None, :]), axis=0)
        best = higher
    tl.store(totals + session * ROWS + row, best + tl.log2(total), mask=row < ROWS)
