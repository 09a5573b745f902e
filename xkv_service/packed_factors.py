"""Token factors whose columns have 2, 4 or 8 bits, packed as they are stored and read row by row.

A column holds the tokens' coordinates along one direction; those of more (weighted) energy get more bits
(`calibration.allocation`). Every column has one scale, which belongs to the layer bases, so that decoding
reads integers: -127 to 127 at 8 bits, the odd numbers -15 to 15 at 4 bits, and -3, -1, 1, 3 at 2 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Runs = tuple[tuple[int, int], ...]
"""Columns in order: (bits of each, how many)."""

BITS = (8, 4, 2)


@dataclass(frozen=True)
class PackedFactors:
    """Token factors [T, r] of one group's keys or values.

    Args:
        runs: columns of equal bits, most bits first.
        pieces: one for each run: int8 [T, columns] at 8 bits, else uint8 [T, ceil(columns bits / 8)], the
            first column in the lowest bits.
    """

    runs: Runs
    pieces: tuple[torch.Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(T, r)."""
        return self.pieces[0].shape[0], rank_of(self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Rows unpacked: int8 [n, r], to be multiplied by the scales in the layer bases."""
        parts = [
            unpack(piece[rows], bits, count)
            for piece, (bits, count) in zip(self.pieces, self.runs, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def first(self, tokens: int) -> PackedFactors:
        """The factors of the first tokens: views."""
        return PackedFactors(self.runs, tuple(piece[:tokens] for piece in self.pieces))

    def to(self, device: torch.device) -> PackedFactors:
        """The same factors on another device."""
        return PackedFactors(self.runs, tuple(piece.to(device) for piece in self.pieces))


def rank_of(runs: Runs) -> int:
    """Columns in all."""
    return sum(count for _, count in runs)


def packed_width(bits: int, columns: int) -> int:
    """Bytes that a row of so many columns takes."""
    return -(-columns * bits // 8)


def leading_runs(runs: Runs, rank: int) -> Runs:
    """The runs of the first `rank` columns."""
    kept: list[tuple[int, int]] = []
    for bits, count in runs:
        taken = min(count, rank - rank_of(tuple(kept)))
        if taken > 0:
            kept.append((bits, taken))
    return tuple(kept)


def leading_columns(factors: torch.Tensor | PackedFactors, rank: int) -> torch.Tensor | PackedFactors:
    """The first `rank` columns of token factors [T, r]: views."""
    if isinstance(factors, torch.Tensor):
        return factors[:, :rank]
    runs = leading_runs(factors.runs, rank)
    kept = zip(factors.pieces, runs, strict=False)
    return PackedFactors(runs, tuple(piece[:, : packed_width(*run)] for piece, run in kept))


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack columns of one width.

    Args:
        integers: int8 [T, n]: any at 8 bits, else odd numbers from 1 - 2^bits to 2^bits - 1.

    Returns:
        int8 [T, n] at 8 bits, else uint8 [T, ceil(n bits / 8)].
    """
    if bits == 8:
        return integers
    each = 8 // bits
    codes = ((integers.to(torch.int16) + (2**bits - 1)) >> 1).to(torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    packed = torch.zeros_like(padded[:, ::each])
    for place in range(each):
        packed |= padded[:, place::each] << (bits * place)
    return packed


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """What `pack` was called on: int8 [n, columns]."""
    if bits == 8:
        return packed
    each = 8 // bits
    codes = torch.stack([packed >> (bits * place) for place in range(each)], -1) & ((1 << bits) - 1)
    whole = codes.flatten(1)[:, :columns].to(torch.int8)
    odd: torch.Tensor = whole * 2 - ((1 << bits) - 1)
    return odd


def column_blocks(runs: Runs, most: int) -> Sequence[tuple[int, int, int]]:
    """(first column, one past the last, bits) of the blocks of at most `most` columns they are stored in."""
    blocks, first = [], 0
    for bits, count in runs:
        for start in range(first, first + count, most):
            blocks.append((start, min(start + most, first + count), bits))
        first += count
    return blocks
