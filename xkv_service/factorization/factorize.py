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
    known: Sequence[torch.Tensor] = (),
) -> list[Factorization]:
    """Factorizations with the least (weighted) squared error at their rank, for several groups at once.

    Args:
        grams: [n, W, W], XᵀX of each group.
        ranks: rank of each, 1 to W.
        weights: per group, one `FeatureWeights` per layer in the order of its features, or None.
        known: per group, layer bases [R, W] of other documents in the metric of `weights`, where there are
            any: an iteration starts from them.

    Returns:
        One `Factorization` per group.
    """
    per_group = [normalized(one) if one else None for one in weights or [None] * len(grams)]
    with precise_products():
        folded, start = _fold_all(grams, per_group), _start(known, per_group)
        vectors, energies = leading_eigenvectors(folded, max(ranks), start)
        pairs = [
            _unfold(basis[:, :rank], one) for basis, rank, one in zip(vectors, ranks, per_group, strict=True)
        ]
        kept = [
            energy[:rank].sum() if one is None else _kept_energy(gram, *pair)
            for gram, energy, rank, one, pair in zip(grams, energies, ranks, per_group, pairs, strict=True)
        ]
    errors = _relative_errors(grams, torch.stack(kept))
    return [Factorization(*pair, error) for pair, error in zip(pairs, errors, strict=True)]


def _fold_all(grams: torch.Tensor, weights: Sequence[list[FeatureWeights] | None]) -> torch.Tensor:
    if all(one is None for one in weights):
        return grams
    return torch.stack([_fold(gram, one) for gram, one in zip(grams, weights, strict=True)])


def _start(
    known: Sequence[torch.Tensor], weights: Sequence[list[FeatureWeights] | None]
) -> torch.Tensor | None:
    """Wᵀ Bᵀ of each group, [n, W, m]: as many of the directions V in B = Vᵀ W⁻¹ as all groups have."""
    if not known:
        return None
    count = min(len(bases) for bases in known)
    directions = [
        bases[:count].T if one is None else apply_blocks([each.blocks.mT for each in one], bases[:count].T)
        for bases, one in zip(known, weights, strict=True)
    ]
    return torch.stack(directions)


def _fold(gram: torch.Tensor, weights: list[FeatureWeights] | None) -> torch.Tensor:
    """Wᵀ G W."""
    if weights is None:
        return gram
    transposed = [weight.blocks.mT for weight in weights]
    half = apply_blocks(transposed, gram)
    folded = apply_blocks(transposed, half.T)
    return (folded + folded.T) / 2


def _unfold(vectors: torch.Tensor, weights: list[FeatureWeights] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Projection [W, r] and bases [r, W] of the eigenvectors of a folded matrix."""
    if weights is None:
        return vectors, vectors.T
    projection = apply_blocks([weight.blocks for weight in weights], vectors)
    return projection, apply_blocks([weight.inverses.mT for weight in weights], vectors).T


def _kept_energy(gram: torch.Tensor, projection: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """|X|² - |X - XPB|² from traces: 2 tr(GPB) - tr(Bᵀ PᵀGP B). Without weights it is tr(PᵀGP)."""
    image = (gram @ projection.to(gram.dtype)).double()
    cross = (image * bases.T).sum()
    small = projection.T @ image
    return 2 * cross - ((small @ bases) * bases).sum()


def _relative_errors(grams: torch.Tensor, kept: torch.Tensor) -> list[float]:
    """|X - XPB| / |X| of each group, given the energy it keeps [n]."""
    total = grams.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    lost = (total - kept).clamp_min(0) / total.clamp_min(torch.finfo(torch.float64).tiny)
    errors: list[float] = lost.sqrt().tolist()
    return errors
