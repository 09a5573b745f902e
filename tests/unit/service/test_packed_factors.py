"""Packed token factors: the integers that went in come out, whatever the columns, rows and bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_service.packed_factors import (
    PackedFactors,
    Runs,
    column_blocks,
    leading_runs,
    pack,
    packed_width,
    rank_of,
    unpack,
)

RUNS: Runs = ((8, 3), (4, 7), (2, 9))


def integers(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    """int8 [rows, columns]: what columns of so many bits may hold."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 8:
        return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    return (2 * codes - (2**bits - 1)).to(torch.int8)


@pytest.fixture
def whole() -> torch.Tensor:
    return torch.cat([integers(20, count, bits) for bits, count in RUNS], 1)


@pytest.fixture
def packed() -> PackedFactors:
    return PackedFactors(RUNS, tuple(pack(integers(20, count, bits), bits) for bits, count in RUNS))


@settings(deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.integers(0, 5),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    before = integers(rows, columns, bits, seed)
    packed = pack(before, bits)
    assert packed.shape == (rows, packed_width(bits, columns))
    assert packed.nbytes == rows * -(-columns * bits // 8)
    assert torch.equal(unpack(packed, bits, columns), before)


def test_the_first_column_is_in_the_lowest_bits() -> None:
    """The bytes that docs/format.md describes."""
    assert pack(torch.tensor([[-3, -1, 1, 3]], dtype=torch.int8), 2).tolist() == [[0b11100100]]
    assert pack(torch.tensor([[-15, 15, 1]], dtype=torch.int8), 4).tolist() == [[0xF0, 0x08]]


@pytest.mark.parametrize("rows", [slice(None), slice(3, 9), slice(5, 5), slice(18, 99)])
def test_rows_of_a_slice_and_of_an_index_are_alike(
    rows: slice, whole: torch.Tensor, packed: PackedFactors
) -> None:
    where = torch.arange(20)[rows]
    assert packed[rows].dtype == torch.int8
    assert torch.equal(packed[rows], whole[rows])
    assert torch.equal(packed[where], whole[where])


def test_rows_come_in_the_order_asked_for(whole: torch.Tensor, packed: PackedFactors) -> None:
    where = torch.tensor([7, 2, 7, 19])
    assert torch.equal(packed[where], whole[where])


def test_the_first_tokens_share_memory(whole: torch.Tensor, packed: PackedFactors) -> None:
    first = packed.first(6)
    assert (packed.shape, first.shape) == ((20, 19), (6, 19))
    assert torch.equal(first[:], whole[:6])
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first.pieces, packed.pieces, strict=True))


def test_moving_to_the_same_device_copies_nothing(packed: PackedFactors) -> None:
    moved = packed.to(torch.device("cpu"))
    assert all(a is b for a, b in zip(moved.pieces, packed.pieces, strict=True))
    assert packed.nbytes == 20 * (3 + 4 + 3)


@given(st.integers(1, 25))
def test_leading_runs_are_the_first_columns(rank: int) -> None:
    runs = leading_runs(RUNS, rank)
    assert rank_of(runs) == min(rank, 19)
    bits = [bits for bits, count in RUNS for _ in range(count)]
    assert [b for b, count in runs for _ in range(count)] == bits[:rank]


@given(
    st.lists(st.tuples(st.sampled_from([8, 4, 2]), st.integers(1, 300)), max_size=4), st.sampled_from([8, 64])
)
def test_blocks_cover_every_column_once_and_hold_one_width(runs: list[tuple[int, int]], most: int) -> None:
    blocks = column_blocks(tuple(runs), most)
    assert [column for start, stop, _ in blocks for column in range(start, stop)] == list(
        range(rank_of(tuple(runs)))
    )
    assert all(0 < stop - start <= most for start, stop, _ in blocks)
    per_column = [bits for bits, count in runs for _ in range(count)]
    assert all(set(per_column[start:stop]) == {bits} for start, stop, bits in blocks)
