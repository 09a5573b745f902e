"""Encode key sketches in one pass over memory (reference: `encode_plainly` in `selection/sketch.py`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

_TOKENS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def]
    keys, planes, codes, scales, tokens, token_stride, head_stride, heads, levels: tl.constexpr,
    zero: tl.constexpr, count: tl.constexpr, block: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * size + tl.arange(0, size)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    plane = tl.arange(0, block)[None, :]
    inside = (row < tokens) & (plane < count)
    dims = planes + (head * count + plane) * 2
    first = tl.load(dims, mask=plane < count, other=0)
    second = tl.load(dims + 1, mask=plane < count, other=0)
    source = keys + row * token_stride + head * head_stride
    x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.maximum(tl.abs(x), tl.abs(y)), axis=1)[:, None]
    scale = tl.minimum(tl.div_rn(peak, tl.full(peak.shape, levels, tl.float32)), 65504.0).to(tl.float16)
    step = tl.broadcast_to(tl.maximum(scale.to(tl.float32), 1.1754943508222875e-38), x.shape)
    low = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(x, step)), -levels), levels) + zero
    high = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(y, step)), -levels), levels) + zero
    code = low.to(tl.int32) | (high.to(tl.int32) << 4)
    place = row * heads + head
    tl.store(codes + place * count + plane, code.to(tl.uint8), mask=inside)
    tl.store(scales + place, scale, mask=row < tokens)


def encode_sketch(
    keys: torch.Tensor, planes: torch.Tensor, levels: int, zero: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rotated keys.

    Args:
        keys: [t, kv_heads, D] on a CUDA device, any float dtype, the last dimension contiguous.
        planes: int16 [kv_heads, P, 2]. levels: largest size of a code. zero: the code of 0.

    Returns:
        uint8 [t, kv_heads, P] and float16 [t, kv_heads].
    """
    tokens, heads, _ = keys.shape
    count = planes.shape[1]
    codes = torch.empty(tokens, heads, count, dtype=torch.uint8, device=keys.device)
    scales = torch.empty(tokens, heads, dtype=torch.float16, device=keys.device)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call] # Triton launches on the current one
        _encode[triton.cdiv(tokens, _TOKENS), heads](
            keys, planes.contiguous(), codes, scales, tokens, keys.stride(0), keys.stride(1), heads, levels,
            zero, count, triton.next_power_of_2(count), _TOKENS,
        )  # fmt: skip
    return codes, scales
