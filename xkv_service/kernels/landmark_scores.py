"""Score every chunk of a prefix by its landmark (reference: `index_shares_plainly` in `decode_plainly.py`).

Landmarks are read once: the scores of all heads, which take a sixteenth of their bytes with four query heads
to a KV head of 128 dimensions of 16 bits, are kept until the sums over all chunks are known. Nothing is
rounded: products of 16-bit numbers are exact, and summed in float32 as in PyTorch.

A program scores one tile of chunks for one KV head. The heads of a tile stand next to each other in the grid,
so that what they read is one run of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.factor_rows import KERNEL_TYPES
from xkv_service.kernels.product import product
from xkv_service.kernels.share_totals import share_totals


@triton.jit  # type: ignore[untyped-decorator]
def _chunk_scores(  # type: ignore[no-untyped-def]
    query, means_at, lengths, scores, peaks, sums, scaling, units, blocks, HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    MEANS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scores in bits of a tile of chunks by one KV head's queries; of each query the largest, and the sum of
    the powers of 2 below it.
    """
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    session = tl.program_id(1).to(tl.int64)
    count = (tl.load(lengths + session) + CHUNK - 1) // CHUNK
    if block * TILE >= count:
        return
    chunk, dim = block.to(tl.int64) * TILE + tl.arange(0, TILE), tl.arange(0, DIM)
    inside = chunk < count
    means = tl.load(means_at + session).to(tl.pointer_type(MEANS))
    source = means + (chunk[:, None] * HEADS + head) * DIM + dim[None, :]
    mean = tl.load(tl.multiple_of(source, [16, 16]), mask=inside[:, None], other=0.0)
    row = tl.arange(0, ROWS)
    there = row < GROUP
    line = (session * HEADS + head) * GROUP + row
    queries = tl.load(query + line[None, :] * DIM + dim[:, None], mask=there[None, :], other=0.0)
    found = product(mean.to(DTYPE), queries.to(DTYPE), tl.full((TILE, ROWS), 0, tl.float32), "ieee")
    found = tl.where(inside[:, None], found * (scaling * 1.4426950408889634), -float("inf"))
    peak = tl.max(found, axis=0)
    place = (session * blocks + block) * (HEADS * GROUP) + head * GROUP + row
    tl.store(peaks + place, peak, mask=there)
    tl.store(sums + place, tl.sum(tl.exp2(found - peak[None, :]), axis=0), mask=there)
    target = scores + line[None, :] * units + chunk[:, None]
    tl.store(target, found, mask=there[None, :] & inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _chunk_shares(  # type: ignore[no-untyped-def]
    scores, totals, lengths, shares, units, QUERY_HEADS: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The logarithm of the largest share of any head, of a tile of chunks."""
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = (tl.load(lengths + session) + CHUNK - 1) // CHUNK
    if block * TILE >= count:
        return
    chunk, head = block.to(tl.int64) * TILE + tl.arange(0, TILE), tl.arange(0, PADDED)
    inside, there = chunk < count, head < QUERY_HEADS
    line = session * QUERY_HEADS + head
    total = tl.load(totals + line, mask=there, other=float("inf"))
    source = scores + line[:, None] * units + chunk[None, :]
    score = tl.load(source, mask=there[:, None] & inside[None, :], other=0.0)
    share = tl.max(score - total[:, None], axis=0) * 0.6931471805599453
    tl.store(shares + session * units + chunk, share, mask=inside)


class LandmarkScores:
    """Scores of one batch of sessions, in memory that is taken once.

    Args:
        sessions: of the batch. capacity: most tokens of a document. heads, group, dim: KV heads, query heads
            of each, and their dimensions. chunk: tokens of a landmark. dtype: of landmarks. scaling: of
            products. tile: chunks of a program.

    Attributes:
        shares: float32 [sessions, chunks of `capacity`], the logarithm of the largest share any head would
            give a chunk.
        totals: float32 [sessions, query_heads], the log in bits of the sum that each head's shares are of.
    """

    def __init__(
        self, sessions: int, capacity: int, heads: int, group: int, dim: int, chunk: int, dtype: torch.dtype,
        scaling: float, device: torch.device, *, tile: int = 64, warps: int = 4,
    ) -> None:  # fmt: skip
        units = triton.cdiv(capacity, chunk)
        self._dtype, self._scaling = dtype, scaling
        self._units, self._blocks = units, triton.cdiv(units, tile)
        self._sizes: dict[str, int] = {"CHUNK": chunk, "TILE": tile}
        self._launch: dict[str, int] = {"num_warps": warps}
        rows = max(16, triton.next_power_of_2(group))
        self._shape: dict[str, int] = {"HEADS": heads, "GROUP": group, "DIM": dim, "ROWS": rows}
        self._scores = torch.empty(sessions, heads * group, units, device=device)
        self._peaks = torch.empty(sessions, self._blocks, heads * group, device=device)
        self._sums = torch.empty_like(self._peaks)
        self.totals = torch.empty(sessions, heads * group, device=device)
        self.shares = torch.empty(sessions, units, device=device)

    def __call__(self, query: torch.Tensor, others: torch.Tensor, table: Any) -> None:
        """Fill `shares`: arguments as of `SketchScores`."""
        (means,) = table.index
        sessions, query_heads = others.shape
        common = self._dtype if query.dtype == self._dtype else torch.float32
        sums, padded = (self._peaks, self._sums), triton.next_power_of_2(query_heads)
        _chunk_scores[self._blocks * self._shape["HEADS"], sessions](
            query, means, table.lengths, self._scores, *sums, self._scaling, self._units, self._blocks,
            MEANS=KERNEL_TYPES[self._dtype], DTYPE=KERNEL_TYPES[common], **self._shape, **self._sizes,
            **self._launch,
        )  # fmt: skip
        share_totals[(sessions,)](
            *sums, others, table.lengths, self.totals, self._blocks, ROWS=query_heads, PADDED=padded, SIZE=64,
            BLOCK=self._sizes["CHUNK"] * self._sizes["TILE"],
        )  # fmt: skip
        _chunk_shares[self._blocks, sessions](
            self._scores, self.totals, table.lengths, self.shares, self._units, QUERY_HEADS=query_heads,
            PADDED=padded, **self._sizes, **self._launch,
        )  # fmt: skip
