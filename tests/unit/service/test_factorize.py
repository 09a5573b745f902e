"""Truncated SVD by Gram matrices against `torch.linalg.svd` in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from xkv_service.calibration.bases import shared_basis
from xkv_service.factorization import subspace
from xkv_service.factorization.factorize import factorize
from xkv_service.factorization.gram import accumulate_gram, fill_rows, product_dtype
from xkv_service.factorization.subspace import leading_eigenvectors, orthonormal, subspace_iteration
from xkv_service.factorization.weights import metric_weights
from xkv_service.kernels.split_product import split

TOKENS, WIDTH, RANK = 1500, 600, 80


def spectrum(decay: float, seed: int = 0) -> torch.Tensor:
    """[TOKENS, WIDTH] with singular values falling as i ** -decay."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    right = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    x = left * torch.arange(1, WIDTH + 1).double() ** -decay @ right
    return x / x.std()


def outliers(decay: float, channels: int) -> torch.Tensor:
    x = spectrum(decay)
    x[:, torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:channels]] *= 1000
    return x


def shifted(decay: float, size: float) -> torch.Tensor:
    return spectrum(decay) + size * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).double()


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "steep": lambda: spectrum(1.5),
    "ordinary": lambda: spectrum(0.7),
    "nearly flat": lambda: spectrum(0.2),
    "eight x1000 channels": lambda: outliers(0.7, 8),
    "more x1000 channels than half the rank": lambda: outliers(0.7, 50),
    "a large mean": lambda: shifted(0.7, 30.0),
}


def optimal_error(x: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(x)[rank:].square().sum().sqrt())


def error_of(x: torch.Tensor, vectors: torch.Tensor) -> float:
    return float((x - x @ vectors @ vectors.T).norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", [leading_eigenvectors, subspace_iteration])
def test_error_is_within_half_a_percent_of_the_optimum(case: str, solver: Callable[..., object]) -> None:
    x = CASES[case]()
    vectors, energies = solver((x.T @ x)[None], RANK)  # type: ignore[misc]
    assert error_of(x, vectors[0]) <= 1.005 * optimal_error(x, RANK)
    assert (energies[0, 1:] <= energies[0, :-1]).all()


def rounded_products(gram: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """What `split_product` computes on a GPU."""
    parts = [part.float() for part in split(gram)]

    def quickly(basis: torch.Tensor) -> torch.Tensor:
        return sum(part @ basis.bfloat16().float() for part in parts)  # type: ignore[return-value]

    return quickly, lambda basis: quickly(basis) + quickly(basis - basis.bfloat16())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rounds", [False, True])
def test_an_accelerators_arithmetic_is_within_half_a_percent_too(
    case: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 inputs, a float32 Gram matrix summed over chunks, a basis rounded to bf16: as on a GPU."""
    if rounds:
        monkeypatch.setattr(subspace, "_products", rounded_products)
    x = CASES[case]().bfloat16()
    gram = sum(part.float().T @ part.float() for part in x.split(256))
    vectors, _ = subspace_iteration(gram[None], RANK)  # type: ignore[index]
    torch.testing.assert_close(vectors[0].T @ vectors[0], torch.eye(RANK).double(), atol=1e-9, rtol=0)
    assert error_of(x.double(), vectors[0]) <= 1.005 * optimal_error(x.double(), RANK)


@pytest.mark.parametrize("solver", [leading_eigenvectors, subspace_iteration])
def test_leading_columns_alone_are_a_good_factorization_of_their_rank(solver: Callable[..., object]) -> None:
    x = spectrum(0.7)
    vectors, _ = solver((x.T @ x)[None], RANK)  # type: ignore[misc]
    assert error_of(x, vectors[0][:, :24]) <= 1.005 * optimal_error(x, 24)


def test_batched_groups_equal_the_groups_alone() -> None:
    grams = torch.stack([x.T @ x for x in (spectrum(0.7, 3), spectrum(0.7, 4))])
    together, _ = subspace_iteration(grams, RANK)
    alone, _ = subspace_iteration(grams[1:], RANK)
    torch.testing.assert_close(together[1] @ together[1].T, alone[0] @ alone[0].T, atol=1e-8, rtol=0)


def test_the_same_input_gives_the_same_bytes() -> None:
    gram = (spectrum(0.7).T @ spectrum(0.7))[None]
    torch.manual_seed(1)
    first = leading_eigenvectors(gram, RANK)[0]
    torch.manual_seed(2)
    assert torch.equal(first, leading_eigenvectors(gram, RANK)[0])
    peaks = first[0].gather(0, first[0].abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()


@pytest.mark.parametrize("rank", [1, 5])
def test_a_matrix_of_lower_rank_than_asked_is_exact(rank: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x = (
        torch.randn(300, rank, generator=generator).double()
        @ torch.randn(rank, 200, generator=generator).double()
    )
    for solver in (leading_eigenvectors, subspace_iteration):
        vectors, _ = solver((x.T @ x)[None], 20)
        assert torch.isfinite(vectors).all()
        assert error_of(x, vectors[0]) <= 1e-6 * float(x.norm())


def test_directions_are_orthonormal_where_energies_are_far_apart() -> None:
    turn = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64)).Q
    gram = (turn * 0.5 ** torch.arange(200, dtype=torch.float64)) @ turn.T
    vectors, _ = subspace_iteration(gram[None], 40)
    torch.testing.assert_close(vectors[0].T @ vectors[0], torch.eye(40).double(), atol=1e-9, rtol=0)


def test_a_zero_matrix_gives_finite_directions() -> None:
    for solver in (leading_eigenvectors, subspace_iteration):
        assert torch.isfinite(solver(torch.zeros(1, 200, 200), 10)[0]).all()


def test_orthonormal_columns_span_the_input_in_order() -> None:
    columns = torch.randn(2, 300, 130, dtype=torch.float64) * torch.logspace(0, -4, 130).double()
    basis = orthonormal(orthonormal(columns))
    eye = torch.eye(130, dtype=torch.float64)
    torch.testing.assert_close(basis.mT @ basis, eye.expand(2, 130, 130), atol=1e-11, rtol=0)
    leading = basis[..., :7]
    torch.testing.assert_close(leading @ (leading.mT @ columns[..., :7]), columns[..., :7], atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [1, 16, 17, 75])
def test_the_inverse_factor_by_halves_is_the_inverse_of_the_whole(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace, "_LEAF", 16)
    half = torch.randn(3, size, 2 * size, dtype=torch.float64)
    matrices = half @ half.mT
    inverse = subspace._inverse_factor(matrices)
    eye = torch.eye(size, dtype=torch.float64).expand(3, size, size)
    torch.testing.assert_close(inverse @ torch.linalg.cholesky(matrices), eye, atol=1e-10, rtol=0)


def test_three_bf16_numbers_hold_every_bit_of_a_float32() -> None:
    matrix = torch.randn(2, 50, 50) * torch.logspace(-20, 20, 50)
    parts = split(matrix)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), matrix.double())  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_a_gram_matrix_in_chunks_and_panels_equals_the_whole_product(chunk: int) -> None:
    layers = [torch.randn(200, 3, 8), torch.randn(200, 1, 5), torch.randn(200, 2, 8)]
    widths = [24, 5, 16]
    gram = accumulate_gram(
        lambda index, start, stop: layers[index][start:stop],
        widths,
        (10, 190),
        chunk_tokens=chunk,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    whole = torch.cat([layer.flatten(1) for layer in layers], 1)[10:190].double()
    torch.testing.assert_close(gram, whole.T @ whole, atol=1e-10, rtol=1e-10)


def test_rows_of_layers_lie_side_by_side() -> None:
    layers = [torch.randn(9, 2, 3), torch.randn(9, 1, 4)]
    rows = fill_rows(torch.empty(5, 10), lambda index, a, b: layers[index][a:b], [6, 4], 3, 7)
    assert torch.equal(rows, torch.cat([layers[0][3:7].flatten(1), layers[1][3:7].flatten(1)], 1))


def test_products_on_a_cpu_are_float64() -> None:
    assert product_dtype(torch.bfloat16, torch.device("cpu")) == torch.float64
    assert product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert product_dtype(torch.float32, torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("case", ["ordinary", "eight x1000 channels"])
@pytest.mark.parametrize("rank", [1, RANK, WIDTH])
def test_the_reported_error_is_the_true_one(case: str, rank: int) -> None:
    x = CASES[case]()
    (result,) = factorize((x.T @ x)[None], [rank])
    true = float((x - x @ result.projection @ result.bases).norm() / x.norm())
    assert result.error == pytest.approx(true, rel=1e-4, abs=1e-6)


def _neighbours(width: int, count: int) -> list[torch.Tensor]:
    """Gram matrices [width, width] of documents whose features have the same directions."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    sizes = torch.arange(1, width + 1, dtype=torch.float64) ** -0.7
    made = []
    for _ in range(count):
        rows = torch.randn(3 * width, width, generator=generator, dtype=torch.float64) * sizes
        made.append((rows @ turn).T @ (rows @ turn))
    return made


def _lost(gram: torch.Tensor, vectors: torch.Tensor) -> float:
    return float(gram.trace() - (vectors * (gram @ vectors)).sum())


def test_three_steps_from_known_directions_are_as_good_as_four_from_random_ones() -> None:
    *others, gram = _neighbours(384, 5)
    known = torch.linalg.eigh(torch.stack(others).sum(0)).eigenvectors.flip(-1)
    best = float(torch.linalg.eigvalsh(gram)[:-40].sum())
    warm = _lost(gram, subspace_iteration(gram[None], 40, known[None])[0][0])
    cold = _lost(gram, subspace_iteration(gram[None], 40)[0][0])
    assert warm <= 1.0001 * cold
    assert warm < 1.005 * best


def test_too_few_known_directions_are_not_started_from() -> None:
    gram = _neighbours(384, 1)[0]
    few = torch.eye(384, dtype=torch.float64)[None, :, :60]
    plain, started = subspace_iteration(gram[None], 40), subspace_iteration(gram[None], 40, few)
    assert all(torch.equal(one, other) for one, other in zip(plain, started, strict=True))


def test_known_bases_are_turned_into_the_directions_they_were_made_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Vᵀ W⁻¹, as a calibration has them: without any step they give the best factors of their document."""
    gram = _neighbours(192, 1)[0]
    square = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = square @ square.mT / 64 + torch.eye(64)
    bases = shared_basis(gram, [metric]).bases
    weights = [metric_weights(metric)]
    (best,) = factorize(gram[None], [30], [weights])
    no_step = partial(subspace_iteration, steps=0)
    monkeypatch.setattr("xkv_service.factorization.factorize.leading_eigenvectors", no_step)
    (random,) = factorize(gram[None], [30], [weights])
    (known,) = factorize(gram[None], [30], [weights], [bases])
    assert known.error == pytest.approx(best.error, rel=2e-3)
    assert random.error > 1.01 * best.error
