"""Products of tiles, in Triton's interpreter too, which multiplies no bfloat16."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, on a CPU."""


@triton.jit  # type: ignore[untyped-decorator]
def product(left, right, total, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + left · right, summed in float32."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total, input_precision=PRECISION)
