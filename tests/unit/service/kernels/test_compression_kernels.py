"""The kernels of compression, held against PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xkv_service.factorization.quantize import LEVELS, round_plainly
from xkv_service.kernels import encode_sketch, round_columns
from xkv_service.kernels.product import INTERPRETED
from xkv_service.kernels.rotate import rotate
from xkv_service.modeling.rotary import rotate_planes
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
