"""Truncated SVD of grouped keys or values from their Gram matrix (paper, section 3.2).

X [T, W] ≈ A B with A = X P. Without weights P = V and B = Vᵀ, where V are the leading right singular vectors:
B's rows are orthonormal, so rounding B to 16 bits costs every feature about the same, and A = U S carries
the scale of the data column by column, which a floating-point format rounds relative to each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.factorization.subspace import leading_eigenvectors, precise_products
from xkv_service.factorization.weights import FeatureWeights, apply_blocks, normalized


@dataclass(frozen=True)
class Factorization:
    """How one group's keys or values become factors.

    Args:
        projection: float64 [W, r]; token factors are A = X projection, columns in singular order.
        bases: float64 [r, W].
        error: |X - AB| / |X| (Frobenius), before A and B are rounded to their stored dtype.
    """

    projection: torch.Tensor
    bases: torch.Tensor
    error: float


def factorize(
    grams: torch.Tensor,
    ranks: Sequence[int],
    weights: Sequence[Sequence[FeatureWeights] | None] | None = None,
) -> list[Factorization]:
    """Factorizations with the least (weighted) squared error at their rank, for several groups at once.

    Args:
        grams: [n, W, W], XᵀX of each group.
        ranks: rank of each, 1 to W.
        weights: per group, one `FeatureWeights` per layer in the order of its features, or None.

    Returns:
        One `Factorization` per group.
    """
    per_group = [normalized(one) if one else None for one in weights or [None] * len(grams)]
    with precise_products():
        vectors, _ = leading_eigenvectors(_fold_all(grams, per_group), max(ranks))
        return [
            _factorization(gram, basis[:, :rank], one)
            for gram, basis, rank, one in zip(grams, vectors, ranks, per_group, strict=True)
        ]


def _fold_all(grams: torch.Tensor, weights: Sequence[list[FeatureWeights] | None]) -> torch.Tensor:
    if all(one is None for one in weights):
        return grams
    return torch.stack([_fold(gram, one) for gram, one in zip(grams, weights, strict=True)])


def _fold(gram: torch.Tensor, weights: list[FeatureWeights] | None) -> torch.Tensor:
    """Wᵀ G W."""
    if weights is None:
        return gram
    transposed = [weight.blocks.mT for weight in weights]
    half = apply_blocks(transposed, gram)
    folded = apply_blocks(transposed, half.T)
    return (folded + folded.T) / 2


def _factorization(
    gram: torch.Tensor, vectors: torch.Tensor, weights: list[FeatureWeights] | None
) -> Factorization:
    projection, bases = vectors, vectors.T
    if weights is not None:
        projection = apply_blocks([weight.blocks for weight in weights], vectors)
        bases = apply_blocks([weight.inverses.mT for weight in weights], vectors).T
    return Factorization(projection, bases, _relative_error(gram, projection, bases))


def _relative_error(gram: torch.Tensor, projection: torch.Tensor, bases: torch.Tensor) -> float:
    """|X - XPB| / |X| from traces: |X|² - 2 tr(GPB) + tr(Bᵀ PᵀGP B)."""
    total = gram.diagonal().double().sum()
    image = (gram @ projection.to(gram.dtype)).double()
    cross = (image * bases.T).sum()
    small = projection.T @ image
    squared = total - 2 * cross + ((small @ bases) * bases).sum()
    return float((squared.clamp_min(0) / total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
