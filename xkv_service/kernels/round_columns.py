"""Round token factors to 8 bits in one pass over memory (reference: `round_plainly` in
`factorization/quantize.py`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

_ROWS, _COLUMNS = 32, 128


@triton.jit  # type: ignore[untyped-decorator]
def _round(  # type: ignore[no-untyped-def]
    factors, scales, out, rows, columns, levels: tl.constexpr, row_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * row_block + tl.arange(0, row_block)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * block + tl.arange(0, block))[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(factors + row * columns + column, mask=inside)
    scale = tl.load(scales + column, mask=column < columns, other=1.0)
    level = libdevice.rint(tl.div_rn(value, tl.broadcast_to(scale, value.shape)))
    level = tl.minimum(tl.maximum(level, -levels), levels)
    tl.store(out + row * columns + column, level.to(tl.int8), mask=inside)


def round_columns(factors: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
    """factors / scales rounded to integers of at most `levels`.

    Args:
        factors: float32 [T, r], contiguous, on a CUDA device. scales: float32 [r], above 0.

    Returns:
        int8 [T, r].
    """
    rows, columns = factors.shape
    factors = factors.contiguous()
    out = torch.empty(rows, columns, dtype=torch.int8, device=factors.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    with torch.cuda.device_of(factors):  # type: ignore[no-untyped-call] # Triton launches on the current one
        _round[grid](factors, scales.contiguous(), out, rows, columns, levels, _ROWS, _COLUMNS)
    return out
