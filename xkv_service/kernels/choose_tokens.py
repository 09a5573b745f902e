"""The best tokens of each session, without sorting (reference: `choose_plainly` in `decode_plainly.py`).

A histogram of the shares gives the bin in which the budget runs out. Tokens above it are chosen; of those in
it the first ones, until the budget is spent. So a token that is left out has at most the share of one that is
chosen, but for the width of a bin (a 32nd of a nat). Sums over the blocks before give every token its place,
hence positions come out ascending, and the same in every run.

The tokens of a unit, of a landmark's chunk, have one share, and a unit is paid for whole: its tokens that are
closed or rebuilt always spend of the budget too, as in PyTorch (`Selection`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.share_bins import share_levels


@triton.jit  # type: ignore[untyped-decorator]
def _levels(  # type: ignore[no-untyped-def]
    shares, states_at, session, token, length, units, UNIT: tl.constexpr, BINS: tl.constexpr
):
    """States of tokens, and the bins of their shares."""
    states = tl.load(states_at + session).to(tl.pointer_type(tl.uint8))
    state = tl.load(states + token, mask=token < length, other=0)
    share = tl.load(shares + session * units + token // UNIT, mask=token < length, other=0.0)
    return state, share_levels(share, BINS)


@triton.jit  # type: ignore[untyped-decorator]
def _count_levels(  # type: ignore[no-untyped-def]
    shares, states_at, lengths, histogram, units, UNIT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add a block's tokens to the histogram: block by block, since tokens of one bin are many."""
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + session)
    if block * BLOCK >= length:
        return
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state, level = _levels(shares, states_at, session, token, length, units, UNIT, BINS)
    paid = state == 1 if UNIT == 1 else token < length
    counts = tl.histogram(level, BINS, mask=paid & (level > 0))
    target = histogram + session * BINS + tl.arange(0, BINS)
    tl.atomic_add(target, counts, mask=counts > 0, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _limit(histogram, budget, session, UNIT: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bin in which the budget runs out, and how many of its tokens it still takes: of whole units, since
    a last one with fewer tokens is paid for as any other.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + session * BINS + bins)
    upward = tl.sum(counts) - tl.cumsum(counts) + counts
    last = tl.max(tl.where(upward >= budget, bins, 0))
    return last, (budget - tl.sum(tl.where(bins > last, counts, 0))) // UNIT * UNIT


@triton.jit  # type: ignore[untyped-decorator]
def _count_chosen(  # type: ignore[no-untyped-def]
    shares, histogram, states_at, lengths, budgets, limits, sure, equals, blocks, units,
    UNIT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens of a block are chosen for sure, and how many have the limit's bin."""
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + session)
    if block * BLOCK >= length:
        return
    last, left = _limit(histogram, tl.load(budgets + session), session, UNIT, BINS)
    if block == 0:
        tl.store(limits + session * 2, last)
        tl.store(limits + session * 2 + 1, left)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state, level = _levels(shares, states_at, session, token, length, units, UNIT, BINS)
    chosen = (state == 2) | ((state == 1) & (level > last))
    tl.store(sure + session * blocks + block, tl.sum(chosen.to(tl.int32)))
    tl.store(equals + session * blocks + block, tl.sum(((state == 1) & (level == last)).to(tl.int32)))


@triton.jit  # type: ignore[untyped-decorator]
def _list_chosen(  # type: ignore[no-untyped-def]
    shares, histogram, states_at, lengths, limits, sure, equals, positions, counts, blocks, units, most,
    UNIT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, session = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + session)
    if block * BLOCK >= length:
        return
    if block == 0:  # nobody reads it any more, and the next call begins with none
        tl.store(histogram + session * BINS + tl.arange(0, BINS), tl.full((BINS,), 0, tl.int32))
    last, left = tl.load(limits + session * 2), tl.load(limits + session * 2 + 1)
    other = tl.arange(0, BLOCKS)
    earlier = session * blocks + other
    equals_before = tl.sum(tl.load(equals + earlier, mask=other < block, other=0))
    before = tl.sum(tl.load(sure + earlier, mask=other < block, other=0)) + tl.minimum(equals_before, left)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state, level = _levels(shares, states_at, session, token, length, units, UNIT, BINS)
    equal = (state == 1) & (level == last)
    rank = equals_before + tl.cumsum(equal.to(tl.int32)) - 1
    chosen = (state == 2) | ((state == 1) & (level > last)) | (equal & (rank < left))
    place = before + tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(positions + session * most + place, token.to(tl.int32), mask=chosen & (place < most))
    if (block + 1) * BLOCK >= length:
        tl.store(counts + session, tl.minimum(before + tl.sum(chosen.to(tl.int32)), most))


class ChooseTokens:
    """The choice of one batch of sessions, in memory that is taken once.

    Args:
        sessions: of the batch. capacity: most tokens of a document. most: tokens of a list at most; none may
            need more, so at least the largest budget and the tokens that are always chosen, or all tokens of
            a document. bins: of the histogram, a power of 2. block: tokens of a program.

    Attributes:
        positions: int32 [sessions, most], ascending. counts: int32 [sessions], how many of them are filled.
    """

    def __init__(
        self, sessions: int, capacity: int, most: int, device: torch.device, *, bins: int = 512,
        block: int = 2048,
    ) -> None:  # fmt: skip
        self._bins, self._block, self.most = bins, block, most
        self._blocks = triton.cdiv(capacity, block)

        def new(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        self._histogram = torch.zeros(sessions, bins, dtype=torch.int32, device=device)
        self._limits, self._sure, self._equals = (
            new(sessions, 2),
            new(sessions, self._blocks),
            new(sessions, self._blocks),
        )
        self.positions, self.counts = new(sessions, most), new(sessions)

    def __call__(self, shares: torch.Tensor, table: Any) -> None:
        """Fill `positions` and `counts`.

        Args:
            shares: float32 [sessions, units], logarithms. table: the layer's `DocumentTable`.
        """
        grid = (self._blocks, shares.shape[0])
        sizes = {"UNIT": table.index_layout.unit, "BINS": self._bins, "BLOCK": self._block}
        sums, counts = (self._limits, self._sure, self._equals), (self._blocks, shares.shape[1])
        _count_levels[grid](shares, table.states, table.lengths, self._histogram, shares.shape[1], **sizes)
        _count_chosen[grid](
            shares, self._histogram, table.states, table.lengths, table.budgets, *sums, *counts, **sizes
        )
        _list_chosen[grid](
            shares, self._histogram, table.states, table.lengths, *sums, self.positions, self.counts, *counts,
            self.most, **sizes, BLOCKS=triton.next_power_of_2(self._blocks),
        )  # fmt: skip
