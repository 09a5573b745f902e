"""Turn rotary planes of keys in one pass over memory (reference: `rotate_planes` in `modeling/rotary.py`).

In PyTorch the same takes six passes, most of them in float32, and turning the keys of a long cache three
times is a good part of what compression costs beside its matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    keys, cos, sin, out, tokens, token_stride, head_stride, out_token_stride, out_head_stride, first, second,
    step, planes: tl.constexpr, block: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * size + tl.arange(0, size)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    plane = tl.arange(0, block)[None, :]
    inside = (rows < tokens) & (plane < planes)
    source = keys + rows * token_stride + head * head_stride + plane * step
    x = tl.load(source + first, mask=inside).to(tl.float32)
    y = tl.load(source + second, mask=inside).to(tl.float32)
    c = tl.load(cos + rows * planes + plane, mask=inside)
    s = tl.load(sin + rows * planes + plane, mask=inside)
    target = out + rows * out_token_stride + head * out_head_stride + plane * step
    tl.store(target + first, x * c - y * s, mask=inside)
    tl.store(target + second, y * c + x * s, mask=inside)


def rotate(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first: slice,
    second: slice,
    out: torch.Tensor,
) -> None:
    """Turn every plane (`first`[i], `second`[i]) of the keys by its angle.

    Args:
        keys: [t, heads, D], any float dtype, the last dimension contiguous.
        cos, sin: float32 [t, D / 2].
        first, second: the planes' dimensions; together they are all of D, and their steps are equal.
        out: where to write, [t, heads, D], any float dtype, the last dimension contiguous.
    """
    tokens, heads, dim = keys.shape
    grid = (triton.cdiv(tokens, _TOKENS), heads)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call] # Triton launches on the current one
        _rotate[grid](
            keys, cos.contiguous(), sin.contiguous(), out, tokens, keys.stride(0), keys.stride(1),
            out.stride(0), out.stride(1), first.start, second.start, first.step, dim // 2,
            triton.next_power_of_2(dim // 2), _TOKENS,
        )  # fmt: skip
