"""Covariances averaged over positions, held against rotating one by one."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from transformers import PreTrainedModel

from xkv_service.calibration import query_covariance as module
from xkv_service.calibration.bases import shared_basis
from xkv_service.calibration.observed import Observed, observe_document
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.query_covariance import average_over_positions, covariance_metric
from xkv_service.modeling.rotary import RotaryTable, rotate_planes
from xkv_service.prefilling.prefill import prefill

DIM, TOKENS = 12, 50
HALVES = torch.tensor([[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]])
PAIRS = torch.tensor([[0, 1], [2, 3], [4, 5]])
"""Neighbours, and half of the dimensions stand still."""


def angles(planes: torch.Tensor, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 0.7 ** torch.arange(len(planes)).float()
    table = RotaryTable(planes, frequencies, scaling=scaling)
    return table.cos_sin(torch.arange(3, 3 + TOKENS))


def plainly(
    covariance: torch.Tensor, planes: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The mean of R_tᵀ C R_t, each R_t as a matrix: the rotation of the unit vectors."""
    total = torch.zeros_like(covariance)
    for position in range(len(cos)):
        here = slice(position, position + 1)
        unit = torch.eye(DIM)[None]  # [1, D "heads", D]: row i is what dimension i becomes
        turned = rotate_planes(unit, planes, cos[here], sin[here])[0].double().mT
        total += turned.mT @ covariance @ turned
    return total / len(cos)


def random_queries(seed: int, count: int = 40, heads: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)
    return torch.randn(heads, count, DIM, dtype=torch.float64, generator=generator) @ mixed


@pytest.mark.parametrize("planes", [HALVES, PAIRS, HALVES[:0]], ids=["halves", "partial", "none"])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("chunk", [8192, 7])
def test_the_average_is_that_of_rotating_one_by_one(
    planes: torch.Tensor, scaling: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    queries = random_queries(0)
    covariance = queries.mT @ queries
    tables = angles(planes, scaling)
    found = average_over_positions(covariance, planes, *tables)
    torch.testing.assert_close(found, plainly(covariance, planes, *tables), rtol=1e-5, atol=1e-4)
    assert torch.equal(found, found.mT)


def test_it_says_what_a_key_error_does_to_scores() -> None:
    """Mean squares of qᵀ R_t e over every query and position, for any error e."""
    queries, tables = random_queries(1), angles(HALVES)
    metric = average_over_positions(queries.mT @ queries / queries.shape[1], HALVES, *tables)
    error = torch.randn(DIM, generator=torch.Generator().manual_seed(2))
    at_every_position = rotate_planes(error.expand(TOKENS, 1, DIM), HALVES, *tables)[:, 0].double()
    scores = queries @ at_every_position.mT  # [heads, queries, positions]
    expected = scores.square().mean((1, 2))
    found = torch.einsum("i,hij,j->h", error.double(), metric, error.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bases_in_the_metric_leave_the_least_score_error() -> None:
    """Folded into the bases: no projection of the same rank leaves less, the plain one among them."""
    queries, tables = random_queries(3, heads=2) * torch.logspace(-1, 1, DIM), angles(HALVES)
    metric = covariance_metric(
        average_over_positions(queries.mT @ queries / queries.shape[1], HALVES, *tables), kv_heads=1
    )
    keys = random_queries(4, count=300, heads=1)[0]
    gram, unit = keys.mT @ keys / len(keys), torch.eye(DIM, dtype=torch.float64)[None]

    def left(of: torch.Tensor) -> float:
        basis = shared_basis(gram, [of])
        error = keys - keys @ basis.projection(4).double() @ basis.bases[:4].double()
        return float(torch.einsum("ti,ij,tj->", error, metric[0], error)) / len(keys)

    best = shared_basis(gram, [metric])
    assert left(metric) == pytest.approx(float(best.energies[4:].sum()), rel=1e-4)
    assert left(metric) < 0.9 * left(unit)


def test_query_heads_of_a_kv_head_count_alike_and_the_metric_is_definite() -> None:
    covariance = torch.zeros(4, DIM, DIM, dtype=torch.float64)
    covariance[1, 0, 0], covariance[3, 5, 5] = 4.0, 8.0
    metric = covariance_metric(covariance, kv_heads=2)
    assert metric.shape == (2, DIM, DIM)
    assert float(metric[0, 0, 0]) == pytest.approx(2, rel=1e-2)
    assert float(metric[1, 5, 5]) == pytest.approx(4, rel=1e-2)
    assert not torch.linalg.cholesky_ex(metric).info.any()
    assert not torch.linalg.cholesky_ex(covariance_metric(torch.zeros_like(covariance), 1)).info.any()


def test_what_is_observed_is_averaged_over_the_documents_own_positions(model: PreTrainedModel) -> None:
    """The sum over the probe's queries, rotated back by every position behind the exact tokens."""
    document = ProbedPrefix.of_text("one", random_ids(80, seed=1).tolist())
    found = Observed.nothing(model, 0)
    observe_document(model, document, found)
    exact = prefill(model, torch.tensor(document.token_ids))
    energy = found.queries[1].diagonal(dim1=-2, dim2=-1)[:, exact.planes(1)].sum(-1)
    both = prefill(model, torch.tensor([*document.token_ids, *document.probes[0].token_ids]))
    whole = both.query_energy(1).double() * both.tokens - exact.query_energy(1).double() * exact.tokens
    torch.testing.assert_close(energy, whole[:, exact.planes(1)].sum(-1), atol=1e-2, rtol=1e-3)
    assert torch.linalg.eigvalsh(found.queries[1]).min() > -1e-6
