"""Token factors in 8 bits: one scale a column, folded into the layer bases, so that decoding is unchanged.

A diag(s)⁻¹ is rounded to integers and B becomes diag(s) B. A column holds the tokens' coordinates along one
singular direction, which are of one size, so a scale per column is enough, and the bytes saved buy nearly
twice the rank.
"""

from __future__ import annotations

import math

import torch

from xkv_service.kernels.probe import has_kernels
from xkv_service.packed_factors import PackedFactors, Runs, pack

LEVELS = 127
# The step of the best uniform quantizer of a Gaussian source, in standard deviations, by bits; real columns
# are tried at a few multiples of it, the small ones for columns where one token is far from the others.
_STEP = {2: 0.9957, 4: 0.3352}
_MULTIPLES = (0.1, 0.3, 0.7, 0.85, 1.0, 1.15, 1.3)


def quantize_columns(factors: torch.Tensor, counted: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and a scale per column.

    Args:
        factors: any float dtype [T, r].
        counted: the rows whose range decides the scale; others (tokens that are kept exact anyway, which may
            be a hundred times larger) are clamped to it.

    Returns:
        int8 [T, r] in -127 .. 127, and float32 [r] with factors ≈ integers * scales.
    """
    peak = torch.linalg.vector_norm(factors[counted], torch.inf, dim=0).float()
    scales = (peak / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    if _on_kernels(factors):
        from xkv_service.kernels.round_columns import round_columns

        return round_columns(factors, scales, LEVELS), scales
    return round_plainly(factors, scales), scales


def round_plainly(factors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """factors / scales as int8, in PyTorch: for columns the reference of the kernel."""
    return (factors / scales).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def quantize_rows(bases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer bases as integers and a scale a row, which the scale of the column it belongs to goes into.

    Args:
        bases: any float dtype [r, W].

    Returns:
        int8 [r, W] in -127 .. 127, and float32 [r] with bases ≈ integers * scales.
    """
    peak = torch.linalg.vector_norm(bases, torch.inf, dim=1).float()
    scales = (peak / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return round_plainly(bases, scales[:, None]), scales


def quantize_runs(factors: torch.Tensor, runs: Runs, counted: slice) -> tuple[PackedFactors, torch.Tensor]:
    """Round columns to the bits of their run.

    Args:
        factors: float32 [T, r]. runs: bits of the columns. counted: the rows that decide a column's scale.

    Returns:
        Packed integers, and float32 [r] with factors ≈ integers * scales.
    """
    pieces, scales, start = [], [], 0
    for bits, count in runs:
        columns = factors[:, start : start + count]
        if bits == 8:
            piece, scale = quantize_columns(columns, counted)
        else:
            scale = best_scales(columns[counted], bits)
            piece = _packed(columns, scale, bits)
        pieces.append(piece)
        scales.append(scale)
        start += count
    return PackedFactors(runs, tuple(pieces)), torch.cat(scales)


def best_scales(columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Half the step of each column with the least squared error among the multiples: float32 [n].

    Args:
        columns: float32 [T, n]. bits: 2 or 4.
    """
    usual = _STEP[bits] / 2 * _root_mean_square(columns)
    tried = torch.stack([(usual * one).clamp_min(torch.finfo(torch.float32).tiny) for one in _MULTIPLES])
    if _on_kernels(columns):
        from xkv_service.kernels.round_odd import squared_errors

        errors = squared_errors(columns, tried, bits)
    else:
        errors = squared_errors_plainly(columns, tried, bits)
    return tried.gather(0, errors.argmin(0, keepdim=True))[0]


def squared_errors_plainly(columns: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """[k, n]: the squared error of columns [T, n] rounded with each of scales [k, n], in PyTorch."""
    return torch.stack(
        [(round_odd_plainly(columns, one, bits) * one - columns).square().sum(0) for one in scales]
    )


def round_odd_plainly(columns: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The odd integers of at most 2^bits - 1 nearest to columns / scales: half a step apart from zero.

    int8 [T, n], in PyTorch: packed the reference of the kernel.
    """
    half = 2 ** (bits - 1)
    steps = (columns / (2 * scales)).floor_().clamp_(-half, half - 1)
    return (2 * steps + 1).to(torch.int8)


def _packed(columns: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    if _on_kernels(columns):
        from xkv_service.kernels.round_odd import pack_odd

        return pack_odd(columns, scales, bits)
    return pack(round_odd_plainly(columns, scales, bits), bits)


def _root_mean_square(columns: torch.Tensor) -> torch.Tensor:
    """Of each column, in one pass on a GPU; a CPU's norm sums one by one, which is less exact."""
    if not columns.is_cuda:
        return columns.square().mean(0).sqrt()
    norms: torch.Tensor = torch.linalg.vector_norm(columns, dim=0)
    return norms / math.sqrt(len(columns))


def _on_kernels(columns: torch.Tensor) -> bool:
    return columns.dtype == torch.float32 and has_kernels(columns.device)
