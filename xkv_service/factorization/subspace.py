"""Leading eigenvectors of Gram matrices: exact (`eigh`) or by batched subspace iteration.

An eigensolver of a 4096-wide matrix takes 95 ms on an H200 and 9 s on a CPU, once per group, for keys and for
values. Subspace iteration needs only matrix products, which run for all groups at once. Its orthonormal
bases come from CholeskyQR in float64 (Fukaya et al., "Shifted Cholesky QR"), products again. In place of a
power of G it applies a Chebyshev polynomial (Zhou et al., "Chebyshev-filtered subspace iteration"), which
separates a flat spectrum in few steps, and applies it root by root, so that every step ends orthonormal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from xkv_service.kernels.split_product import can_split, split, split_product

OVERSAMPLING = 64
FILTER_STEPS = 4
WARM_STEPS = 3
"""From a calibration's directions: what 4 steps reach from random ones (benchmarks/warm_start.py)."""
ORDER_STEPS = 3
_SHIFT = 1e-12
_LEAF = 256

_Product = Callable[[torch.Tensor], torch.Tensor]


def leading_eigenvectors(
    grams: torch.Tensor, rank: int, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal directions of most energy, in descending order, deterministic signs.

    Args:
        grams: [n, W, W] symmetric positive semidefinite, float64 or float32; overwritten never.
        rank: directions wanted, 1 to W.
        start: [n, W, m], directions that are near those wanted, if any are known.

    Returns:
        float64: vectors [n, W, rank] and energies [n, rank] (eigenvalues, >= 0).
    """
    width = grams.shape[-1]
    if width <= 1024 and grams.device.type == "cpu" or 2 * (rank + OVERSAMPLING) > width:
        vectors, energies = _exact(grams, rank)
    else:
        vectors, energies = subspace_iteration(grams, rank, start)
    return _fix_signs(vectors), energies


def _exact(grams: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    energies, vectors = torch.linalg.eigh(grams.double())
    top = vectors[..., -rank:].flip(-1).contiguous()
    return top, energies[..., -rank:].flip(-1).clamp_min(0)


def subspace_iteration(
    grams: torch.Tensor,
    rank: int,
    start: torch.Tensor | None = None,
    *,
    steps: int | None = None,
    order_steps: int = ORDER_STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Filtered orthogonal iteration with oversampling, then the same inside the small space.

    The second stage, on H = QᵀGQ, turns the basis towards single eigenvectors in descending order, so that
    the `rank` columns kept are the best ones. It costs products of [rank, rank] only, where an eigensolver
    on a GPU takes 10 ms a matrix. Products with G run in `grams.dtype` (`_products`), all else in float64.
    `mend` is one Newton step to the basis's nearest orthonormal one, which is all that a last pass of
    CholeskyQR leaves to do where energies are those that float32 can tell apart.

    Args:
        start: [n, W, m] in the place of random columns; used where m is at least rank + `OVERSAMPLING`.
        steps: by default `WARM_STEPS` from `start`, else `FILTER_STEPS`.

    Returns:
        float64: vectors [n, W, rank], energies [n, rank].
    """
    batch, width, _ = grams.shape
    size = min(width, rank + OVERSAMPLING)
    product, precisely = _products(grams)
    if start is None or start.shape[-1] < size:
        basis, usual = orthonormal(product(_random(batch, width, size, grams))), FILTER_STEPS
    else:
        basis, usual = orthonormal(start[..., :size]), WARM_STEPS
    basis = _filtered(product, basis, grams.dtype, usual if steps is None else steps)
    if grams.dtype == torch.float64 or steps == 0:
        basis = orthonormal(basis)  # directions of next to no energy, and columns that no step has ordered
    eye = torch.eye(size, dtype=torch.float64, device=grams.device).expand(batch, size, size)
    mend = 1.5 * eye - basis.mT @ basis / 2
    small = mend @ (basis.mT @ precisely(basis.to(grams.dtype)).double()) @ mend
    turn = _filtered(lambda columns: small @ columns, eye, eye.dtype, order_steps)
    energies = (turn * (small @ turn)).sum(-2)
    energies, order = energies.sort(dim=-1, descending=True, stable=True)
    turn = turn.gather(-1, order[..., None, :rank].expand(batch, size, rank))
    return basis @ (mend @ turn), energies[..., :rank].clamp_min(0)


def _filtered(product: _Product, basis: torch.Tensor, dtype: torch.dtype, steps: int) -> torch.Tensor:
    """Orthonormal float64 columns that span p(G) basis: p is small on [0, b] and grows fast above b.

    p is the Chebyshev polynomial of degree `steps` on [0, b], one factor (G - root b) a step. b is the least
    Rayleigh quotient of the basis, an estimate of the eigenvalue its last direction ends at: too low a one
    filters less and does no harm.

    Args:
        product: multiplies [n, W, m] of `dtype` by G from the left. basis: [n, W, m], orthonormal.
    """
    for step in range(steps):
        root = (1 - math.cos(math.pi * (step + 0.5) / steps)) / 2
        columns = basis.to(dtype)
        image = product(columns)
        bound = (columns * image).sum(-2).amin(-1)[:, None, None]
        basis = orthonormal(image - root * bound * columns)
    return basis


def _products(grams: torch.Tensor) -> tuple[_Product, _Product]:
    """What multiplies a basis by G, quickly and precisely.

    Quickly may round the basis to bf16, which only moves where the next step starts. Precisely it is
    multiplied as two bf16 numbers, an error of 2^-17.
    """
    if not can_split(grams):
        return (lambda basis: grams @ basis,) * 2
    parts = split(grams)

    def quickly(basis: torch.Tensor) -> torch.Tensor:
        return split_product(parts, basis)

    return quickly, lambda basis: quickly(basis) + quickly(basis - basis.bfloat16())


@contextmanager
def precise_products() -> Iterator[None]:
    """float32 products in full float32 (no TF32) inside the block: small eigenvalues drown otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _random(batch: int, width: int, size: int, grams: torch.Tensor) -> torch.Tensor:
    """The same random block on every device of a kind, whatever the global seed."""
    generator = torch.Generator(grams.device).manual_seed(0)
    block = torch.randn(width, size, generator=generator, dtype=torch.float32, device=grams.device)
    return block.to(grams.dtype).expand(batch, width, size)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of `columns` [n, W, m], in float64, first columns first.

    One pass leaves an error of about 1e-16 times the squared condition number; a second one removes it. The
    shift keeps the Cholesky factor defined for dependent columns, which come out small instead.
    """
    columns = columns.double()
    overlap = columns.mT @ columns
    scale = overlap.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    cosines = overlap * scale[:, :, None] * scale[:, None, :]
    cosines.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
    return columns @ (_inverse_factor(cosines) * scale[:, None, :]).mT


def _inverse_factor(matrices: torch.Tensor) -> torch.Tensor:
    """Inverse of the Cholesky factor of [n, m, m] positive definite matrices, by halves.

    In products, half as long on a GPU as Cholesky and a triangular solve of the whole.
    """
    size = matrices.shape[-1]
    if size <= _LEAF:
        factor = torch.linalg.cholesky_ex(matrices).L
        eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
        leaf: torch.Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        return leaf
    half = size // 2
    inverse = torch.zeros_like(matrices)
    upper = _inverse_factor(matrices[:, :half, :half])
    below = matrices[:, half:, :half] @ upper.mT
    lower = _inverse_factor(matrices[:, half:, half:] - below @ below.mT)
    inverse[:, :half, :half], inverse[:, half:, half:] = upper, lower
    inverse[:, half:, :half] = -(lower @ below) @ upper
    return inverse


def _fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Each column's entry of largest size made positive: an eigenvector's sign is arbitrary."""
    peaks = vectors.abs().argmax(dim=-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, peaks) < 0, -1.0, 1.0).to(vectors.dtype)
