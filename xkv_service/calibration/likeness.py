"""How alike layers are: linear CKA of their keys and of their values, from second moments alone."""

from __future__ import annotations

import torch

from xkv_service.calibration.calibration import Kind
from xkv_service.calibration.moments import Moments


def layer_likeness(moments: Moments) -> dict[str, list[list[float | None]]]:
    """By "key" and "value": linear CKA [L, L], None where two layers' products were not kept.

    Linear CKA of centered features is |C_ij|² / (|C_ii| |C_jj|) with cross-covariances C (Kornblith et al.,
    2019, equation 5).
    """
    return {kind: _matrix(moments, kind) for kind in moments.kinds}


def _matrix(moments: Moments, kind: Kind) -> list[list[float | None]]:
    count = len(moments.layers)
    norms = [float(moments.covariance(kind, place).norm()) for place in range(count)]
    matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
    for first in range(count):
        for second in range(first, min(first + moments.reach, count - 1) + 1):
            norm = float(_cross(moments, kind, first, second).norm())
            matrix[first][second] = matrix[second][first] = norm**2 / max(
                norms[first] * norms[second], 1e-300
            )
    return matrix


def _cross(moments: Moments, kind: Kind, first: int, second: int) -> torch.Tensor:
    """Cross-covariance [W_first, W_second] of two layers, second not before first."""
    held = moments.kind(kind)
    widths = [held.products[place].shape[0] for place in range(first, second + 1)]
    product = held.products[first][:, sum(widths[:-1]) : sum(widths)] / moments.tokens
    return product - torch.outer(held.sums[first], held.sums[second]) / moments.tokens**2
