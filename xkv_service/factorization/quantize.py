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
    peak = factors[counted].abs().amax(dim=0).float()
    scales = (peak / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (factors / scales).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scales
