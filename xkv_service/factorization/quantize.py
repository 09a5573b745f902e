"""Token factors in 8 bits: one scale a column, folded into the layer bases, so that decoding is unchanged.

A diag(s)⁻¹ is rounded to integers and B becomes diag(s) B. A column holds the tokens' coordinates along one
singular direction, which are of one size, so a scale per column is enough, and the bytes saved buy nearly
twice the rank.
"""

from __future__ import annotations

import torch

LEVELS = 127


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
    if factors.is_cuda and factors.dtype == torch.float32:
        from xkv_service.kernels.round_columns import round_columns

        return round_columns(factors, scales, LEVELS), scales
    return round_plainly(factors, scales), scales


def round_plainly(factors: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """factors / scales as int8, in PyTorch: the reference of the kernel."""
    return (factors / scales).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
