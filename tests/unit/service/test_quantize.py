"""Token factors in 8 bits are as good as their scale per column allows, whatever the exact tokens hold."""

from __future__ import annotations

import torch

from xkv_service.factorization.quantize import LEVELS, quantize_columns


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
