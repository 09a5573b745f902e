"""Products with a float32 matrix on tensor cores, which have no float32 (reference: `matrix @ basis`).

Three bf16 numbers of 8 significant bits hold the 24 of a float32 exactly, so the matrix loses nothing; the
basis is rounded to bf16. Five times as fast as float32 on an H200.
"""

from __future__ import annotations

import torch


def can_split(matrix: torch.Tensor) -> bool:
    """Whether this device multiplies bf16 with float32 sums faster than float32."""
    return (
        matrix.is_cuda
        and matrix.dtype == torch.float32
        and torch.cuda.get_device_capability(matrix.device) >= (8, 0)
    )


def split(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Three bf16 tensors of the shape of float32 `matrix` whose sum it is."""
    parts = []
    rest = matrix
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    return parts


def split_product(parts: list[torch.Tensor], basis: torch.Tensor) -> torch.Tensor:
    """sum(parts) @ bf16(basis): float32 [n, W, m].

    Args:
        parts: bf16 [n, W, W] each, on a CUDA device, the largest first. basis: any float dtype [n, W, m].
    """
    right = basis.bfloat16()
    total = torch.bmm(parts[-1], right, out_dtype=torch.float32)
    for part in parts[-2::-1]:
        total += torch.bmm(part, right, out_dtype=torch.float32)
    return total
