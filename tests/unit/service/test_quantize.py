"""Token factors in 8 bits are as good as their scale per column allows, whatever the exact tokens hold."""

from __future__ import annotations

import pytest
import torch

from xkv_service.calibration.allocation import DISTORTION
from xkv_service.factorization.quantize import LEVELS, quantize_columns, quantize_runs


def test_each_number_is_within_half_a_step_of_its_column() -> None:
    factors = torch.randn(500, 40) * torch.logspace(3, -3, 40)
    integers, scales = quantize_columns(factors, slice(0, 500))
    assert integers.dtype == torch.int8
    assert ((integers * scales - factors).abs() <= 0.5001 * scales).all()
    torch.testing.assert_close(scales * LEVELS, factors.abs().amax(0))


def test_tokens_kept_exact_do_not_widen_the_steps_of_the_others() -> None:
    factors = torch.randn(300, 8)
    plain = quantize_columns(factors, slice(4, 300))
    factors[:4] *= 1000
    integers, scales = quantize_columns(factors, slice(4, 300))
    assert torch.equal(scales, plain[1])
    assert torch.equal(integers[4:], plain[0][4:])
    assert integers[:4].abs().max() == LEVELS


def test_a_column_of_zeros_stays_zero() -> None:
    integers, scales = quantize_columns(torch.zeros(10, 3), slice(0, 10))
    assert not integers.any()
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize(("bits", "tolerance"), [(2, 0.05), (4, 0.05), (8, 0.15)])
def test_normal_columns_lose_what_allocation_counts_on(bits: int, tolerance: float) -> None:
    rows = 200_000  # as many as reach 4.5 standard deviations
    factors = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1, 50, 1e3]
    )
    packed, scales = quantize_runs(factors, ((bits, 4),), slice(0, rows))
    lost = (packed[:] * scales - factors).square().sum(0) / factors.square().sum(0)
    torch.testing.assert_close(lost / DISTORTION[bits], torch.ones(4), atol=tolerance, rtol=0)


def test_runs_are_rounded_each_to_its_own_bits() -> None:
    factors = torch.randn(400, 9, generator=torch.Generator().manual_seed(1)) * torch.logspace(2, -2, 9)
    packed, scales = quantize_runs(factors, ((8, 2), (4, 3), (2, 4)), slice(0, 400))
    assert (packed.runs, packed.shape, scales.shape) == (((8, 2), (4, 3), (2, 4)), (400, 9), (9,))
    lost = (packed[:] * scales - factors).square().sum(0) / factors.square().sum(0)
    assert (lost[:2] < 2e-4).all() and (lost[2:5] < 0.015).all() and (lost[5:] < 0.14).all()
    values = packed[:]
    assert set(values[:, 2:5].unique().tolist()) <= set(range(-15, 16, 2))
    assert set(values[:, 5:].unique().tolist()) <= {-3, -1, 1, 3}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_column_that_is_nearly_constant_loses_less_than_a_normal_one(bits: int) -> None:
    """As the mean of keys is: one direction with an energy of 10,000 and little variance."""
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(2))
    factors = torch.tensor([100.0, -100.0]) + noise
    packed, scales = quantize_runs(factors, ((bits, 2),), slice(0, 1000))
    lost = (packed[:] * scales - factors).square().sum(0) / factors.square().sum(0)
    assert (lost < DISTORTION[bits]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_runs_of_zeros_stay_small_and_finite(bits: int) -> None:
    packed, scales = quantize_runs(torch.zeros(10, 3), ((bits, 3),), slice(0, 10))
    assert (scales >= torch.finfo(torch.float32).tiny).all()
    assert float((packed[:] * scales).abs().max()) < 1e-30


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_that_do_not_count_change_no_other(bits: int) -> None:
    factors = torch.randn(300, 6, generator=torch.Generator().manual_seed(3))
    plain, plain_scales = quantize_runs(factors, ((bits, 6),), slice(4, 300))
    factors[:4] *= 1000
    packed, scales = quantize_runs(factors, ((bits, 6),), slice(4, 300))
    assert torch.equal(scales, plain_scales)
    assert torch.equal(packed[4:300], plain[4:300])
    assert packed[:4].abs().max() == (127 if bits == 8 else 2**bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_row_far_from_the_others_costs_at_most_its_own_energy(bits: int) -> None:
    """No column is worse than leaving it out; ten times the size leaves the other rows their bits."""
    factors = torch.randn(2000, 3, generator=torch.Generator().manual_seed(4))
    factors[77] *= torch.tensor([10.0, 100.0, 1000.0]) / factors[77]
    packed, scales = quantize_runs(factors, ((bits, 3),), slice(0, 2000))
    lost = (packed[:] * scales - factors).square()
    assert (lost.sum(0) <= factors.square().sum(0)).all()
    others = torch.arange(2000) != 77
    assert float(lost[others, 0].mean()) < 1.3 * {2: 0.13, 4: 0.015, 8: 0.0006}[bits]
