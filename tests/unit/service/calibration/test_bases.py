"""Shared bases: orthonormal in the metric, and no others of their rank leave less error in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xkv_service.calibration.bases import shared_basis

HEADS, DIM = 2, 6
LAYERS = 2
WIDTH = LAYERS * HEADS * DIM


def random_metric(seed: int, floor: float = 1e-3) -> list[torch.Tensor]:
    """By layer float64 [heads, D, D], of very different eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(LAYERS, HEADS, DIM, DIM, generator=generator, dtype=torch.float64)
    roots *= torch.logspace(0, -2, DIM, dtype=torch.float64)
    return [root @ root.mT + floor * torch.eye(DIM, dtype=torch.float64) for root in roots]


def keys(mean: float, seed: int = 0, tokens: int = 300) -> torch.Tensor:
    """float64 [T, W] of correlated features; a mean of 100 has 10,000 times their energy."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) @ mixed / WIDTH**0.5
    return x + mean * torch.randn(WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5


def dense(metric: list[torch.Tensor]) -> torch.Tensor:
    return torch.block_diag(*[block for layer in metric for block in layer])


def weighted(residual: torch.Tensor, metric: list[torch.Tensor]) -> float:
    """Mean squared error of a token in the metric."""
    return float((residual @ dense(metric) * residual).sum(1).mean())


CASES = pytest.mark.parametrize("mean", [0.0, 100.0])


@CASES
def test_bases_are_orthonormal_in_the_metric(mean: float) -> None:
    x, metric = keys(mean), random_metric(1)
    basis = shared_basis(x.T @ x / len(x), metric)
    bases = basis.bases.double()
    torch.testing.assert_close(
        bases @ dense(metric) @ bases.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-4, rtol=0
    )


@CASES
@pytest.mark.parametrize("rank", [1, 5, 23, 24])
def test_no_other_bases_of_the_rank_leave_less(mean: float, rank: int) -> None:
    """Against the SVD of X W in numpy (Eckart and Young)."""
    x, metric = keys(mean), random_metric(2)
    basis = shared_basis(x.T @ x / len(x), metric).leading(rank)
    left = x - (x @ basis.projection(rank).double()) @ basis.bases.double()
    singular = np.linalg.svd((x @ torch.linalg.cholesky(dense(metric))).numpy(), compute_uv=False)
    least = float((singular[rank:] ** 2).sum()) / len(x)
    total = float((singular**2).sum()) / len(x)
    assert weighted(left, metric) == pytest.approx(least, rel=1e-3, abs=1e-9 * total)


@CASES
def test_energies_sum_to_the_weighted_trace_and_say_what_leaving_out_costs(mean: float) -> None:
    x, metric = keys(mean), random_metric(3)
    basis = shared_basis(x.T @ x / len(x), metric)
    assert float(basis.energies.double().sum()) == pytest.approx(weighted(x, metric), rel=1e-5)
    assert (basis.energies[1:] <= basis.energies[:-1]).all()
    kept = torch.tensor([0, 1, 4, 9])  # any columns, as bit allocation leaves them
    factors = x @ basis.projection(WIDTH).double()
    left = x - factors[:, kept] @ basis.bases[kept].double()
    others = [one for one in range(WIDTH) if one not in kept.tolist()]
    assert weighted(left, metric) == pytest.approx(float(basis.energies[others].double().sum()), rel=1e-3)


def test_features_without_energy_have_no_worth() -> None:
    x = keys(0.0)
    x[:, :12] = 0
    basis = shared_basis(x.T @ x / len(x), random_metric(4))
    assert torch.isfinite(basis.bases).all()
    assert float(basis.energies[12:].sum()) < 1e-9 * float(basis.energies.sum())
    left = x - (x @ basis.projection(12).double()) @ basis.bases[:12].double()
    assert float(left.norm() / x.norm()) < 1e-4


def test_fewer_tokens_than_features_are_described_by_as_many_directions() -> None:
    x = keys(0.0, tokens=7)
    basis = shared_basis(x.T @ x / len(x), random_metric(5))
    left = x - (x @ basis.projection(7).double()) @ basis.bases[:7].double()
    assert float(left.norm() / x.norm()) < 1e-4


def test_leading_directions_keep_the_energies_of_all() -> None:
    x = keys(0.0)
    basis = shared_basis(x.T @ x / len(x), random_metric(6))
    few = basis.leading(3)
    assert torch.equal(few.bases, basis.bases[:3])
    assert torch.equal(few.energies, basis.energies)
    assert torch.equal(few.projection(3), basis.projection(3))


def test_a_device_has_one_copy_for_all_documents() -> None:
    x = keys(0.0)
    basis = shared_basis(x.T @ x / len(x), random_metric(1))
    elsewhere = torch.device("meta")
    assert basis.on(elsewhere) is basis.on(elsewhere)
    copied = [basis.on(elsewhere).bases, *basis.on(elsewhere).metric, basis.on(elsewhere).energies]
    own = [basis.bases, *basis.metric, basis.energies]
    assert [one.shape for one in copied] == [one.shape for one in own]
    assert {one.device for one in copied} == {elsewhere}
    assert basis.on(basis.bases.device).bases is basis.bases
