"""Covariances of queries, averaged over the positions at which they meet a document's keys.

An error e of a key before RoPE, at position t, changes the score of a rotated query q by qᵀ R_t e. Its
expected square over queries and positions is eᵀ M e with M = E[R_tᵀ q qᵀ R_t], a metric of keys before RoPE.
R_tᵀ q is the query as that key meets it, so M is the mean over relative positions.
"""

from __future__ import annotations

import torch

_FLOOR = 1e-3
_CHUNK = 8192


def average_over_positions(
    covariance: torch.Tensor, planes: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The mean over positions t of R_tᵀ C R_t, exactly.

    In the coordinates (x + iy) / √2 and (x - iy) / √2 of each plane R_tᵀ is diagonal, so that averaging
    multiplies each entry of C by the mean of the product of two phases.

    Args:
        covariance: float64 [..., D, D], symmetric, of rotated queries.
        planes: int64 [P, 2], pairs of dimensions that turn together; the others stand still.
        cos, sin: [T, P] of the positions, T at least 1, scale included.

    Returns:
        float64 [..., D, D], symmetric.
    """
    turn = _diagonalizing(planes, covariance.shape[-1]).to(covariance.device)
    turned = turn @ covariance.to(turn.dtype) @ turn.mH
    averaged = (turn.mH @ (turned * _mean_phases(planes, cos, sin, turn.shape[0])) @ turn).real
    found: torch.Tensor = (averaged + averaged.mT) / 2
    return found


def covariance_metric(covariance: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The mean over each KV head's query heads as a metric, made definite: float64 [kv_heads, D, D].

    Args:
        covariance: float64 [query_heads, D, D], of `average_over_positions`.
    """
    heads, dim = covariance.shape[:2]
    per_head = covariance.reshape(kv_heads, heads // kv_heads, dim, dim).mean(1)
    mean = per_head.diagonal(dim1=-2, dim2=-1).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return per_head + _FLOOR * mean * torch.eye(dim, dtype=torch.float64, device=covariance.device)


def _mean_phases(planes: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int) -> torch.Tensor:
    """Mean over positions of phase_i conj(phase_j), where R_tᵀ multiplies coordinate i by phase_i."""
    total = torch.zeros(dim, dim, dtype=torch.complex128, device=cos.device)
    for start in range(0, len(cos), _CHUNK):
        some = slice(start, start + _CHUNK)
        angles = torch.complex(cos[some].double(), sin[some].double())
        phases = torch.ones(len(angles), dim, dtype=torch.complex128, device=cos.device)
        phases[:, planes[:, 0]], phases[:, planes[:, 1]] = angles.conj(), angles
        total += phases.mT @ phases.conj()
    return total / len(cos)


def _diagonalizing(planes: torch.Tensor, dim: int) -> torch.Tensor:
    """U, unitary, complex128 [D, D] on the CPU: a plane's rows are (x + iy) / √2 and (x - iy) / √2."""
    real = torch.eye(dim, dtype=torch.float64)
    imaginary = torch.zeros(dim, dim, dtype=torch.float64)
    first, second, half = planes[:, 0].cpu(), planes[:, 1].cpu(), 2**-0.5
    real[first, first] = real[second, first] = half
    real[second, second] = 0
    imaginary[first, second], imaginary[second, second] = half, -half
    return torch.complex(real, imaginary)
