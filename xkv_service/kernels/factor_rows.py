"""Token factors laid out for gathering: every row one run of aligned bytes, whatever its columns' bits.

A gather reads whole rows at scattered positions. `PackedFactors` keeps columns of each width in a tensor of
their own, whose rows begin anywhere; here they follow one another in one row, each width at a multiple of 16
bytes, so that a kernel reads 16 bytes at once and one token is one place in memory. Made when a prefix is
loaded; the file does not change. `FactorRows.factors` are the same bytes as PyTorch reads them, so that no
second copy has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from xkv_service.kernels.product import INTERPRETED
from xkv_service.packed_factors import PackedFactors, packed_width

_ALIGNED = 16
KERNEL_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}
SHAPE = tl.constexpr(8)
"""Numbers of a session in a table's shapes, which begin at 16 bytes."""


@dataclass(frozen=True)
class RowLayout:
    """Which columns a row has: whole numbers first, then those of 4 bits, then those of 2.

    Args:
        whole: dtype of the first columns. whole_columns, four_columns, two_columns: how many of each width.
    """

    whole: torch.dtype
    whole_columns: int
    four_columns: int = 0
    two_columns: int = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Columns of each width: numbers that kernels read, so that rows of any rank go in one launch."""
        return self.whole_columns, self.four_columns, self.two_columns

    @property
    def rank(self) -> int:
        """Columns in all."""
        return sum(self.counts)

    @property
    def four_offset(self) -> int:
        """The byte where columns of 4 bits begin."""
        return _padded(self.whole_columns * self.whole.itemsize)

    @property
    def two_offset(self) -> int:
        """The byte where columns of 2 bits begin."""
        return self.four_offset + _padded(packed_width(4, self.four_columns))

    @property
    def stride(self) -> int:
        """Bytes from one row to the next, a multiple of 16."""
        return self.two_offset + _padded(packed_width(2, self.two_columns))

    @property
    def widths(self) -> tuple[torch.dtype, bool, bool]:
        """What kernels are compiled for: the dtype of whole numbers, whether there are 4 bits, and 2."""
        return self.whole, self.four_columns > 0, self.two_columns > 0

    @property
    def arguments(self) -> dict[str, Any]:
        """`widths`, as kernels take them by name."""
        whole, four, two = self.widths
        return {"WHOLE": KERNEL_TYPES[whole], "WHOLE_BYTES": whole.itemsize, "FOUR": four, "TWO": two}


@dataclass(frozen=True)
class FactorRows:
    """Token factors [T, r] of one group's keys or values.

    Args:
        layout: of each row. data: uint8 [T, layout.stride].
    """

    layout: RowLayout
    data: torch.Tensor

    @classmethod
    def of(cls, factors: torch.Tensor | PackedFactors) -> FactorRows:
        """The rows of factors on their device; a view where they are laid out like this already.

        Raises:
            ValueError: a dtype that kernels do not read.
        """
        if isinstance(factors, torch.Tensor):
            return cls._whole(factors)
        if [bits for bits, _ in factors.runs] != sorted({bits for bits, _ in factors.runs}, reverse=True):
            raise ValueError(f"runs={factors.runs}: rows have one run of each width, most bits first")
        counts = dict(factors.runs)
        layout = RowLayout(torch.int8, *(counts.get(bits, 0) for bits in (8, 4, 2)))
        width, offsets = layout.stride, {8: 0, 4: layout.four_offset, 2: layout.two_offset}
        first = factors.pieces[0]
        starts = [offsets[bits] for bits, _ in factors.runs]
        if _are_rows(factors.pieces, starts, width):
            return cls(layout, _rows_from(first, width))
        data = torch.zeros(first.shape[0], width, dtype=torch.uint8, device=first.device)
        for piece, (bits, count) in zip(factors.pieces, factors.runs, strict=True):
            data[:, offsets[bits] : offsets[bits] + packed_width(bits, count)] = piece.view(torch.uint8)
        return cls(layout, data)

    @property
    def factors(self) -> torch.Tensor | PackedFactors:
        """What the rows were made of: views of them."""
        layout, data = self.layout, self.data
        whole = data[:, : layout.whole_columns * layout.whole.itemsize].view(layout.whole)
        if not layout.four_columns + layout.two_columns:
            return whole
        widths = ((8, layout.whole_columns, 0), (4, layout.four_columns, layout.four_offset))
        runs, pieces = [], []
        for bits, count, start in (*widths, (2, layout.two_columns, layout.two_offset)):
            if count:
                runs.append((bits, count))
                pieces.append(whole if bits == 8 else data[:, start : start + packed_width(bits, count)])
        return PackedFactors(tuple(runs), tuple(pieces))

    @classmethod
    def _whole(cls, factors: torch.Tensor) -> FactorRows:
        if factors.dtype not in KERNEL_TYPES:
            raise ValueError(f"token factors of {factors.dtype} have no kernel")
        count, size = factors.shape[1], factors.element_size()
        layout = RowLayout(factors.dtype, count)
        width = layout.stride
        if _are_rows([factors], [0], width):
            return cls(layout, _rows_from(factors, width))
        data = torch.zeros(factors.shape[0], width // size, dtype=factors.dtype, device=factors.device)
        data[:, :count] = factors
        return cls(layout, data.view(torch.uint8))


def _are_rows(pieces: Sequence[torch.Tensor], starts: Sequence[int], width: int) -> bool:
    """Whether pieces [T, columns] stand at bytes `starts` of the same rows of `width` bytes, aligned."""
    base = pieces[0].data_ptr() - starts[0]
    return base % _ALIGNED == 0 and all(
        piece.data_ptr() == base + start
        and piece.stride(1) == 1
        and piece.stride(0) * piece.element_size() == width
        for piece, start in zip(pieces, starts, strict=True)
    )


def _rows_from(piece: torch.Tensor, width: int) -> torch.Tensor:
    """The whole rows, uint8 [T, width], whose first columns a piece is: a view."""
    return piece.view(torch.uint8).as_strided((piece.shape[0], width), (width, 1))


def _padded(width: int) -> int:
    return -(-width // _ALIGNED) * _ALIGNED


@triton.jit  # type: ignore[untyped-decorator]
def _converted(numbers, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers in another dtype; the interpreter knows the way to bfloat16 by float32 only."""
    return numbers.to(tl.float32).to(DTYPE) if INTERPRETED else numbers.to(DTYPE)


@triton.jit
def column_counts(shape):  # type: ignore[no-untyped-def]
    """`RowLayout.counts` of a session: what its row of a `DocumentTable`'s shapes begins with."""
    return tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)


@triton.jit  # type: ignore[untyped-decorator]
def row_offsets(whole, four, two, WHOLE_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes where columns of 4 bits begin, where those of 2 do, and where the next row does (`RowLayout`)."""
    at_four = (whole * WHOLE_BYTES + 15) // 16 * 16
    at_two = at_four + ((four + 1) // 2 + 15) // 16 * 16
    return at_four, at_two, at_two + ((two + 3) // 4 + 15) // 16 * 16


@triton.jit  # type: ignore[untyped-decorator]
def whole_columns(  # type: ignore[no-untyped-def]
    rows, first, columns, DTYPE: tl.constexpr, WHOLE: tl.constexpr, WHOLE_BYTES: tl.constexpr,
    COUNT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + COUNT - 1 of the `columns` whole numbers, [N, COUNT]; zeros behind the last.

    `rows` are the addresses of the rows' first bytes, int64 [N, 1]; `first` is a multiple of 16. FULL: none
    is behind the last.
    """
    column = first + tl.arange(0, COUNT)[None, :]
    source = rows.to(tl.pointer_type(WHOLE)) + column
    source = tl.multiple_of(source, [16, 16])
    if FULL:
        found = tl.load(source)
    else:  # the row's own padding is zeros, and read 16 bytes at once
        each: tl.constexpr = 16 // WHOLE_BYTES
        found = tl.load(source, mask=column < (columns + each - 1) // each * each, other=0)
    return _converted(found, DTYPE) if WHOLE != DTYPE else found


@triton.jit  # type: ignore[untyped-decorator]
def packed_columns(  # type: ignore[no-untyped-def]
    rows, first, columns, DTYPE: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + COUNT - 1 of the `columns` of BITS bits, [N, COUNT]; finite behind the last.

    `rows` are the addresses of their first bytes; `first` is a multiple of COUNT, and COUNT of 64.
    """
    each: tl.constexpr = 8 // BITS
    size: tl.constexpr = COUNT // each
    byte = first // each + tl.arange(0, size)[None, :]
    source = tl.multiple_of(rows.to(tl.pointer_type(tl.uint8)) + byte, [16, 16])
    there = ((columns + each - 1) // each + 15) // 16 * 16
    raw = tl.load(source, mask=byte < there, other=0)
    if BITS == 4:
        codes = tl.join(raw & 15, raw >> 4)
    else:
        even = tl.join(raw & 3, (raw >> 4) & 3)
        odd = tl.join((raw >> 2) & 3, raw >> 6)
        codes = tl.join(even, odd)
    levels = codes.to(tl.int8) * 2 - ((1 << BITS) - 1)
    return _converted(tl.reshape(levels, (rows.shape[0], COUNT)), DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def sixteen_bits(  # type: ignore[no-untyped-def]
    rows, first, columns, BITS: tl.constexpr, COUNT: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """What columns first .. first + COUNT - 1 stand in, int16 [N, COUNT / (16 / BITS)]: see `every`.

    `rows` are the addresses of their first bytes; `first` is a multiple of 16 / BITS. FULL: all columns are
    there; else those behind the last of the `columns` are of any kind, but finite.
    """
    each: tl.constexpr = 16 // BITS
    size: tl.constexpr = COUNT // each
    number = first // each + tl.arange(0, size)[None, :]
    source = tl.multiple_of(rows.to(tl.pointer_type(tl.int16)) + number, [16, 16])
    if FULL:
        return tl.load(source)
    there = ((columns + each - 1) // each + 7) // 8 * 8  # whole runs of 16 bytes, as rows have them
    return tl.load(source, mask=number < there, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def every(sixteen, PLACE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns PLACE, PLACE + 16 / BITS, ... of what `sixteen_bits` read: int8, or the odd levels of 4 or
    2 bits. They stay where they are, so the rows that they are multiplied with are taken in this order.

    bfloat16 has 7 bits of a number behind the point: 0x4300 and 7 bits are 128 and their number.
    """
    if (tl.bfloat16 == DTYPE) & (not INTERPRETED):
        if BITS == 8:  # their highest bit is -128: what it stands for is taken away
            select: tl.constexpr = 0x4341 if PLACE else 0x4240
            return tl.inline_asm_elementwise(
                f"{{ .reg .b32 x, y, z; mov.b32 z, 0xBF80BF80; prmt.b32 x, $1, 0x43434343, {select};"
                "and.b32 y, x, 0xFF80FF80; and.b32 x, x, 0xFF7FFF7F; fma.rn.bf16x2 $0, y, z, x; }",
                "=r,r", [sixteen], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        # Twice the code and 128, from which 128 and the largest code are taken away.
        shift: tl.constexpr = BITS * PLACE - 1
        move: tl.constexpr = f"shr.b32 x, $1, {shift};" if PLACE else "shl.b32 x, $1, 1;"
        mask: tl.constexpr = (2 << BITS) - 2
        mask2: tl.constexpr = mask * 65537
        last: tl.constexpr = 0xC30FC30F if BITS == 4 else 0xC303C303
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 x, y, z; mov.b32 y, 0x3F803F80; mov.b32 z, {last}; {move}"
            f"lop3.b32 x, x, {mask2}, 0x43004300, 0xEA; fma.rn.bf16x2 $0, x, y, z; }}",
            "=r,r", [sixteen], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    raw = sixteen.to(tl.int32)
    if BITS == 8:
        numbers = (raw << (24 - 8 * PLACE)) >> 24
    else:
        numbers = ((raw >> (BITS * PLACE)) & ((1 << BITS) - 1)) * 2 - ((1 << BITS) - 1)
    return _converted(numbers, DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def scaled(columns, scale, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """columns · scale in DTYPE, rounded once: a product of two bfloat16 numbers is exact in float32."""
    if (tl.bfloat16 == DTYPE) & (not INTERPRETED):
        return columns * scale
    return (columns.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
