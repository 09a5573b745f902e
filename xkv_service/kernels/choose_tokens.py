"""The best tokens of each session, without sorting (reference: `choose_plainly` in `decode_plainly.py`).

A histogram of the shares gives the bin in which the budget runs out. Tokens above it are chosen; of those in
it the first ones, until the budget is spent. So a token that is left out has at most the share of one that is
chosen, but for the width of a bin (a 32nd of a nat). Sums over the blocks before give every token its place,
hence positions come out ascending, and the same in every run.

Sessions on one document get one list, the union of what each chose, with a bit for each of them: a token
that several chose is rebuilt once, and nobody attends to what only others chose.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.share_bins import share_levels

MOST_SESSIONS = 32
"""Sessions that share a list: bits of a number. More on one document are several entries of the table."""


@triton.jit  # type: ignore[untyped-decorator]
def _count_levels(  # type: ignore[no-untyped-def]
    shares, states_at, lengths, document_of, histogram, capacity, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add a block's tokens to a session's histogram: block by block, since tokens of one bin are many."""
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    document = tl.load(document_of + session)
    length = tl.load(lengths + document)
    if block * BLOCK >= length:
        return
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    states = tl.load(states_at + document).to(tl.pointer_type(tl.uint8))
    choosable = tl.load(states + token, mask=token < length, other=0) == 1
    share = tl.load(shares + session * capacity + token, mask=token < length, other=0.0)
    level = share_levels(share, BINS)
    counts = tl.histogram(level, BINS, mask=choosable & (level > 0))
    tl.atomic_add(
        histogram + session * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed"
    )


@triton.jit  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    shares, histogram, states_at, lengths, budgets, document_of, limits, equals, blocks, capacity,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    document = tl.load(document_of + session)
    length, budget = tl.load(lengths + document), tl.load(budgets + document)
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + session * BINS + bins)
    upward = tl.sum(counts) - tl.cumsum(counts) + counts
    last = tl.max(tl.where(upward >= budget, bins, 0))
    if block == 0:
        above = tl.sum(tl.where(bins > last, counts, 0))
        tl.store(limits + session * 2, last)
        tl.store(limits + session * 2 + 1, budget - above)
    if block * BLOCK >= length:
        return
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    states = tl.load(states_at + document).to(tl.pointer_type(tl.uint8))
    choosable = tl.load(states + token, mask=token < length, other=0) == 1
    share = tl.load(shares + session * capacity + token, mask=token < length, other=0.0)
    equal = choosable & (share_levels(share, BINS) == last)
    tl.store(equals + session * blocks + block, tl.sum(equal.to(tl.int32)))


@triton.jit  # type: ignore[untyped-decorator]
def _mark(  # type: ignore[no-untyped-def]
    shares, states_at, lengths, starts, limits, equals, histogram, members, sizes, blocks, capacity,
    BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, document = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + document)
    if block * BLOCK >= length:
        return
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < length
    states = tl.load(states_at + document).to(tl.pointer_type(tl.uint8))
    state = tl.load(states + token, mask=inside, other=0)
    begin = tl.load(starts + document).to(tl.int64)
    other = tl.arange(0, BLOCKS)
    member = tl.where(state == 2, -1, 0)
    for number in range(0, tl.load(starts + document + 1) - tl.load(starts + document)):
        session = begin + number
        last, left = tl.load(limits + session * 2), tl.load(limits + session * 2 + 1)
        share = tl.load(shares + session * capacity + token, mask=inside, other=0.0)
        level = share_levels(share, BINS)
        equal = (state == 1) & (level == last)
        before = tl.sum(tl.load(equals + session * blocks + other, mask=other < block, other=0))
        rank = before + tl.cumsum(equal.to(tl.int32)) - 1
        chosen = ((state == 1) & (level > last)) | (equal & (rank < left))
        member = member | (chosen.to(tl.int32) << number)
        if block == 0:  # for the next call
            tl.store(histogram + session * BINS + tl.arange(0, BINS), tl.full((BINS,), 0, tl.int32))
    tl.store(members + document * capacity + token, member, mask=inside)
    tl.store(sizes + document * blocks + block, tl.sum((member != 0).to(tl.int32)))


@triton.jit  # type: ignore[untyped-decorator]
def _compact(  # type: ignore[no-untyped-def]
    members, sizes, lengths, positions, kept, counts, blocks, capacity, most, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block, document = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + document)
    if block * BLOCK >= length:
        return
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    other = tl.arange(0, BLOCKS)
    before = tl.sum(tl.load(sizes + document * blocks + other, mask=other < block, other=0))
    member = tl.load(members + document * capacity + token, mask=token < length, other=0)
    chosen = (member != 0).to(tl.int32)
    place = before + tl.cumsum(chosen) - 1
    there = (chosen > 0) & (place < most)
    tl.store(positions + document * most + place, token.to(tl.int32), mask=there)
    tl.store(kept + document * most + place, member, mask=there)
    if (block + 1) * BLOCK >= length:
        tl.store(counts + document, tl.minimum(before + tl.sum(chosen), most))


class ChooseTokens:
    """The choice of one batch of sessions, in memory that is taken once.

    Args:
        sessions, documents: of the batch. capacity: most tokens of a document. most: tokens of a document's
            list at most; no list may need more, so at least the sum of its sessions' budgets and the tokens
            that are always chosen, or all its tokens. bins: of the histogram, a power of 2. block: tokens of a
            program.

    Attributes:
        positions: int32 [documents, most], ascending. members: int32 [documents, most], bit i: the
            document's session number i chose it. counts: int32 [documents], how many of them are filled.
    """

    def __init__(
        self, sessions: int, documents: int, capacity: int, most: int, device: torch.device, *,
        bins: int = 512, block: int = 2048,
    ) -> None:  # fmt: skip
        self._bins, self._block, self._capacity, self.most = bins, block, capacity, most
        self._blocks = triton.cdiv(capacity, block)

        def new(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        self._histogram = torch.zeros(sessions, bins, dtype=torch.int32, device=device)
        self._limits, self._equals = new(sessions, 2), new(sessions, self._blocks)
        self._marks, self._sizes = new(documents, capacity), new(documents, self._blocks)
        self.positions, self.members, self.counts = new(documents, most), new(documents, most), new(documents)

    def __call__(self, shares: torch.Tensor, table: Any) -> None:
        """Fill `positions`, `members` and `counts` from the shares that `IndexScores` left."""
        sessions, documents = shares.shape[0], self.counts.shape[0]
        sizes = (self._blocks, self._capacity)
        bins = {"BINS": self._bins, "BLOCK": self._block}
        blocks = triton.next_power_of_2(self._blocks)
        _count_levels[self._blocks, sessions](
            shares, table.states, table.lengths, table.document_of, self._histogram, self._capacity, **bins
        )
        _count[self._blocks, sessions](
            shares, self._histogram, table.states, table.lengths, table.budgets, table.document_of, self._limits,
            self._equals, *sizes, **bins,
        )  # fmt: skip
        _mark[self._blocks, documents](
            shares, table.states, table.lengths, table.starts, self._limits, self._equals, self._histogram,
            self._marks, self._sizes, *sizes, **bins, BLOCKS=blocks,
        )  # fmt: skip
        _compact[self._blocks, documents](
            self._marks, self._sizes, table.lengths, self.positions, self.members, self.counts, *sizes,
            self.most, BLOCK=self._block, BLOCKS=blocks,
        )  # fmt: skip
