"""The kernels of compression, held against PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xkv_service.factorization import quantize
from xkv_service.factorization.quantize import (
    LEVELS,
    quantize_runs,
    round_odd_plainly,
    round_plainly,
    squared_errors_plainly,
)
from xkv_service.kernels import encode_sketch, round_columns
from xkv_service.kernels.product import INTERPRETED
from xkv_service.kernels.rotate import rotate
from xkv_service.kernels.round_odd import pack_odd, squared_errors
from xkv_service.modeling.rotary import rotate_planes
from xkv_service.packed_factors import Runs, pack
from xkv_service.selection.sketch import encode_plainly

HEADS, TOKENS, DIM = 3, 70, 32


@pytest.fixture(autouse=True)
def rint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function of a device that kernels call, which nothing interprets: the nearest integer, of two
    the even one. Numbers of 24 bits have no fractions from 2^23 on.
    """

    def nearest(number: Any) -> Any:
        return (number + 1.5 * 2**23) - 1.5 * 2**23

    for module in (encode_sketch, round_columns) if INTERPRETED.value else ():
        monkeypatch.setattr(module, "libdevice", SimpleNamespace(rint=nearest))


def cached(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """States [TOKENS, HEADS, DIM], a view as a cache gives it."""
    torch.manual_seed(0)
    return torch.randn(HEADS, TOKENS + 4, DIM).to(device, dtype)[:, 4:].transpose(0, 1)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 5), (torch.bfloat16, 8)])
def test_sketches_are_encoded(dtype: torch.dtype, count: int, device: torch.device) -> None:
    """Keys of no size, too small and too large for scales in half precision, and midway between two codes."""
    keys = cached(dtype, device)
    order = torch.stack([torch.randperm(DIM // 2)[:count] for _ in range(HEADS)])
    planes = torch.stack([order, order + DIM // 2], -1).to(device, torch.int16)
    keys[7], keys[8], keys[9] = 0, keys[8] * 1e-8, keys[9] * 1e6
    keys[10] = torch.arange(DIM, device=device) % 14 - 6.5
    for head in range(HEADS):
        keys[10, head, planes[head, 0].long()] = 7
    expected = encode_plainly(keys, planes)
    for found, wanted in zip(encode_sketch.encode_sketch(keys, planes, 7, 8), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(expected[0][10].unique()) > 2 * count // 3 and expected[1][9].max() == 65504


def test_token_factors_are_rounded(device: torch.device) -> None:
    """Outliers, which are clamped, and numbers midway between two integers."""
    torch.manual_seed(0)
    factors = torch.randn(TOKENS, 131, device=device) * torch.logspace(-3, 3, 131, device=device)
    scales = factors[4:].abs().amax(0) / LEVELS
    factors[:4] *= 100
    factors[:, 1], scales[1] = torch.arange(TOKENS, device=device) - 30.5, 1
    found = round_columns.round_columns(factors, scales, LEVELS)
    assert torch.equal(found, round_plainly(factors, scales))
    assert found.min() == -LEVELS and found.max() == LEVELS


def columns_among_others(count: int, device: torch.device) -> torch.Tensor:
    """[TOKENS, count] of many sizes, behind others: one of zeros, one with a token far from the rest, numbers
    midway between two levels of scale 1, and numbers whose squares are too small for float32.
    """
    torch.manual_seed(0)
    factors = torch.randn(TOKENS, count + 9, device=device) * torch.logspace(-6, 6, count + 9, device=device)
    columns = factors[:, 5 : 5 + count]
    columns[:, 0], columns[33, 1] = 0, 1000 * columns[34, 1]
    columns[:, 2] = 2 * (torch.arange(TOKENS, device=device) % 19 - 9)
    columns[:, 3] *= 1e-30
    return columns


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [4, 67, 150])
def test_columns_of_few_bits_are_rounded_and_packed(bits: int, count: int, device: torch.device) -> None:
    columns = columns_among_others(count, device)
    scales = (columns.abs().amax(0) / 2**bits).clamp_min(torch.finfo(torch.float32).tiny)
    scales[2] = 1
    found = pack_odd(columns, scales, bits)
    assert torch.equal(found, pack(round_odd_plainly(columns, scales, bits), bits))
    assert torch.equal(pack_odd(columns.T.contiguous().T, scales, bits), found)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [4, 67, 150])
def test_errors_of_columns_of_few_bits(bits: int, count: int, device: torch.device) -> None:
    """Within 1e-5: quotients rounded otherwise, and another order of the sums."""
    columns = columns_among_others(count, device)
    scales = columns.square().mean(0).sqrt() * torch.tensor([[0.02], [0.2], [1.0]], device=device)
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    found = squared_errors(columns, scales, bits)
    expected = squared_errors_plainly(columns.double(), scales.double(), bits).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-37)
    assert expected[:, 1:3].min() > 0
    assert torch.equal(squared_errors(columns, scales, bits), found)


def test_the_steps_of_columns_are_the_best_of_those_tried(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch finds another one, its error is within 1e-5 of that one's. Rows that do not count are
    clamped.
    """
    runs: Runs = ((8, 3), (4, 40), (2, 29))
    factors, counted = columns_among_others(72, device), slice(4, TOKENS - 3)
    factors[:4] *= 100
    monkeypatch.setattr(quantize, "has_kernels", lambda device: False)
    plain, expected = quantize_runs(factors, runs, counted)
    monkeypatch.setattr(quantize, "has_kernels", lambda device: True)
    packed, scales = quantize_runs(factors, runs, counted)
    assert [one.dtype for one in packed.pieces] == [torch.int8, torch.uint8, torch.uint8]
    first = 0
    for bits, count in runs:
        columns = slice(first, first + count)
        if bits < 8:
            mine, best = (
                squared_errors_plainly(factors[counted, columns].double(), one[None, columns].double(), bits)
                for one in (scales, expected)
            )
            assert bool((mine <= best * (1 + 1e-5)).all())
            assert float((scales[columns] == expected[columns]).float().mean()) > 0.9
        first += count
    assert torch.equal(packed[:][:, scales == expected], plain[:][:, scales == expected])
    assert packed[:][:4, 3:43].abs().max() == 15


@pytest.mark.parametrize(
    ("step", "dtype", "target"), [(1, torch.bfloat16, torch.float32), (2, torch.float32, torch.bfloat16)]
)
def test_keys_are_rotated_into_place(
    step: int, dtype: torch.dtype, target: torch.dtype, device: torch.device
) -> None:
    """Planes of dimensions i and i + D / 2, or 2 i and 2 i + 1; what is written to is a view, too."""
    keys, angles = cached(dtype, device), torch.randn(TOKENS, DIM // 2, device=device)
    half = DIM // 2
    first, second = (
        (slice(0, half, 1), slice(half, DIM, 1)) if step == 1 else (slice(0, DIM, 2), slice(1, DIM, 2))
    )
    room = torch.full((HEADS, TOKENS + 1, DIM), torch.nan, dtype=target, device=device)
    out = room[:, :-1].transpose(0, 1)
    rotate(keys, angles.cos(), 2 * angles.sin(), first, second, out)
    dims = torch.arange(DIM)
    planes = torch.stack([dims[first], dims[second]], 1)
    expected = rotate_planes(keys.cpu(), planes, angles.cos().cpu(), 2 * angles.sin().cpu()).to(target)
    torch.testing.assert_close(
        out.cpu(), expected, atol=1e-5, rtol=1e-2 if target == torch.bfloat16 else 1e-5
    )
    assert room[:, -1].isnan().all()
