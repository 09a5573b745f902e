"""Truncated SVD by Gram matrices against `torch.linalg.svd` in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xkv_service.factorization import subspace
from xkv_service.factorization.factorize import factorize
from xkv_service.factorization.gram import accumulate_gram, fill_rows, product_dtype
from xkv_service.factorization.subspace import leading_eigenvectors, orthonormal, subspace_iteration
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


def rounded_product(gram: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `split_product` computes on a GPU."""
    parts = [part.float() for part in split(gram)]
    return lambda basis: sum(part @ basis.bfloat16().float() for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rounds", [False, True])
def test_an_accelerators_arithmetic_is_within_half_a_percent_too(
    case: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 inputs, a float32 Gram matrix summed over chunks, a basis rounded to bf16: as on a GPU."""
    if rounds:
        monkeypatch.setattr(subspace, "_product", rounded_product)
    x = CASES[case]().bfloat16()
    gram = sum(part.float().T @ part.float() for part in x.split(256))
    vectors, _ = subspace_iteration(gram[None], RANK)  # type: ignore[index]
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
