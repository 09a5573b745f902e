"""Aligned rows hold what packed factors hold, and kernels read them so."""

from __future__ import annotations

import kernel_samples as samples
import pytest
import torch

from xkv_service.kernels.decode_plainly import factors_of
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.packed_factors import PackedFactors

KINDS = ["float", "int8", "mixed", "8+2", "4", "2"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_the_factors(kind: str) -> None:
    torch.manual_seed(0)
    factors = samples.factors(50, 53, kind, torch.float32)
    rows = FactorRows.of(factors)
    where = torch.tensor([3, 49, 0, 3])
    assert rows.layout.rank == 53
    assert rows.layout.stride % 16 == 0 and rows.data.shape == (50, rows.layout.stride)
    assert torch.equal(factors_of(rows, where), factors[where].float())


def test_aligned_factors_are_not_copied() -> None:
    factors = torch.randn(10, 64).bfloat16()
    assert FactorRows.of(factors).data.data_ptr() == factors.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_factors_and_rows_again_in_the_same_memory(kind: str) -> None:
    torch.manual_seed(0)
    factors = samples.factors(50, 53, kind, torch.float32)
    rows = FactorRows.of(factors)
    assert torch.equal(rows.factors[:], factors[:])
    shorter = rows.factors.first(20) if isinstance(rows.factors, PackedFactors) else rows.factors[:20]
    for one, count in ((rows.factors, 50), (shorter, 20)):
        again = FactorRows.of(one)
        assert again.layout == rows.layout and again.data.data_ptr() == rows.data.data_ptr()
        assert torch.equal(again.data, rows.data[:count])


def test_rows_of_unknown_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        FactorRows.of(torch.randn(4, 4).double())
    piece = torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="most bits first"):
        FactorRows.of(PackedFactors(((2, 8), (4, 4)), (piece, piece)))
