"""Token factors in 2 or 4 bits, rounded to odd numbers of half steps: what a step loses, and the packed codes
(references: `squared_errors_plainly` and `round_odd_plainly` in `factorization/quantize.py`).

Each reads the columns once. Errors are summed over the rows of a tile, and the tiles' sums by PyTorch, always
in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xkv_service.packed_factors import packed_width

_ROWS, _COLUMNS = 64, 64
"""Of a tile whose errors are summed."""
_PACKED_ROWS, _PACKED_COLUMNS = 32, 128
_WHOLE = tl.constexpr(1.5 * 2**23)
"""Added and taken away again, it leaves the nearest integer: of 24 bits none are left for fractions."""


@triton.jit  # type: ignore[untyped-decorator]
def _sum_errors(  # type: ignore[no-untyped-def]
    columns, scales, out, rows, count, row_stride, column_stride, tries: tl.constexpr, half: tl.constexpr,
    row_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * row_block + tl.arange(0, row_block)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * block + tl.arange(0, block)).to(tl.int64)[None, :]
    known = column < count
    value = tl.load(columns + row * row_stride + column * column_stride, mask=(row < rows) & known, other=0.0)
    counts = tl.where(row < rows, 1.0, 0.0)  # a product, where a choice would compare again for each scale
    sums = out + tl.program_id(0).to(tl.int64) * tries * count + column
    for one in tl.static_range(tries):
        step = 2 * tl.load(scales + one * count + column, mask=known, other=1.0)
        place = value * (1 / step) - 0.5  # in steps from the level above zero
        level = (tl.minimum(tl.maximum(place, -half), half - 1) + _WHOLE) - _WHOLE
        missed = (level - place) * counts
        total = tl.sum(missed * missed, axis=0)[None, :] * step * step
        tl.store(sums + one * count, total, mask=known)


@triton.jit  # type: ignore[untyped-decorator]
def _pack(  # type: ignore[no-untyped-def]
    columns, scales, out, rows, count, width, row_stride, column_stride, bits: tl.constexpr,
    row_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    each: tl.constexpr = 8 // bits
    half: tl.constexpr = 2 ** (bits - 1)
    row = (tl.program_id(0) * row_block + tl.arange(0, row_block)).to(tl.int64)[:, None]
    number = tl.arange(0, block)[None, :]
    column = (tl.program_id(1) * block + number).to(tl.int64)
    known = column < count
    value = tl.load(columns + row * row_stride + column * column_stride, mask=(row < rows) & known, other=0.0)
    step = 2 * tl.load(scales + column, mask=known, other=1.0)
    level = tl.floor(tl.div_rn(value, tl.broadcast_to(step, value.shape)))
    level = tl.minimum(tl.maximum(level, -half), half - 1)
    code = tl.where(known, level.to(tl.int32) + half, 0) << (bits * (number % each))
    packed = tl.sum(tl.reshape(code, (row_block, block // each, each)), axis=2)
    place = (tl.program_id(1) * (block // each) + tl.arange(0, block // each))[None, :]
    tl.store(out + row * width + place, packed.to(tl.uint8), mask=(row < rows) & (place < width))


def squared_errors(columns: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The squared error of each column, rounded with each of several scales.

    Args:
        columns: float32 [T, n] on a CUDA device, of any strides; fastest where rows are contiguous.
        scales: float32 [k, n], half the step, normal numbers above 0. bits: 2 or 4.

    Returns:
        float32 [k, n], summed over the T rows.
    """
    (rows, count), tries = columns.shape, len(scales)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(count, _COLUMNS))
    sums = torch.empty(grid[0], tries, count, dtype=torch.float32, device=columns.device)
    with torch.cuda.device_of(columns):  # type: ignore[no-untyped-call] # Triton launches on the current one
        _sum_errors[grid](
            columns, scales.contiguous(), sums, rows, count, *columns.stride(), tries, 2 ** (bits - 1),
            _ROWS, _COLUMNS,
        )  # fmt: skip
    return sums.sum(0)


def pack_odd(columns: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """columns / scales rounded to odd integers of 2 or 4 bits, packed as `packed_factors.pack` does.

    Args:
        columns: float32 [T, n], as above. scales: float32 [n], half the step, above 0.

    Returns:
        uint8 [T, ceil(n bits / 8)].
    """
    rows, count = columns.shape
    width = packed_width(bits, count)
    out = torch.empty(rows, width, dtype=torch.uint8, device=columns.device)
    grid = (triton.cdiv(rows, _PACKED_ROWS), triton.cdiv(count, _PACKED_COLUMNS))
    with torch.cuda.device_of(columns):  # type: ignore[no-untyped-call] # Triton launches on the current one
        _pack[grid](
            columns, scales.contiguous(), out, rows, count, width, *columns.stride(), bits, _PACKED_ROWS,
            _PACKED_COLUMNS,
        )  # fmt: skip
    return out
