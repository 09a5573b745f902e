"""Second moments add up: chunks, documents and halves of a sample do not matter."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from measured import moments_of, rows

from xkv_service.analysis.cka import linear_cka
from xkv_service.calibration import moments as module
from xkv_service.calibration.calibration import KINDS
from xkv_service.calibration.likeness import layer_likeness
from xkv_service.calibration.moments import Moments
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill

LAYERS = 3


def assert_same(one: Moments, other: Moments) -> None:
    assert one.tokens == other.tokens
    for kind in KINDS:
        mine, theirs = one.kind(kind), other.kind(kind)
        for a, b in zip(mine.products + mine.sums, theirs.products + theirs.sums, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)])
def test_a_gram_is_the_mean_product_of_the_layers_side_by_side(
    prefills: list[Prefill], moments: Moments, kind: str, first: int, count: int
) -> None:
    x = torch.cat([rows(prefills, kind, place) for place in range(first, first + count)], 1)
    found = moments.gram(kind, first, count)  # type: ignore[arg-type]
    torch.testing.assert_close(found, x.T @ x / len(x), atol=1e-9, rtol=1e-9)
    assert torch.equal(found, found.T)
    assert moments.tokens == len(x) == 90 + 37 + 61 - 3 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_covariances_variances_and_energies_are_those_of_the_rows(
    prefills: list[Prefill], moments: Moments, kind: str
) -> None:
    for place in range(LAYERS):
        x = rows(prefills, kind, place)
        covariance = torch.cov(x.T, correction=0)
        torch.testing.assert_close(moments.covariance(kind, place), covariance, atol=1e-9, rtol=1e-9)  # type: ignore[arg-type]
        assert moments.variance(kind, place) == pytest.approx(float(covariance.trace()))  # type: ignore[arg-type]
        energy = x.square().mean(0).reshape(2, -1)
        torch.testing.assert_close(moments.energy(kind, place), energy)  # type: ignore[arg-type]


def test_chunks_and_the_order_of_documents_do_not_matter(
    prefills: list[Prefill], moments: Moments, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(moments_of(prefills[::-1]), moments)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert_same(moments_of(prefills), moments)


def test_halves_add_up(prefills: list[Prefill], moments: Moments) -> None:
    half = moments_of(prefills[:1])
    half.add(moments_of(prefills[1:]))
    assert_same(half, moments)


def test_layers_out_of_reach_are_refused(prefills: list[Prefill]) -> None:
    near = moments_of(prefills, reach=1)
    near.gram("key", 1, 2)
    with pytest.raises(ValueError, match="3 layers: only products of 2 neighbours"):
        near.gram("key", 0, 3)
    with pytest.raises(ValueError, match="2 layers from position 2"):
        near.gram("value", 2, 2)


def test_a_document_of_exact_tokens_alone_counts_its_last_one(prefills: list[Prefill]) -> None:
    assert moments_of(prefills, skip=1000).tokens == 3


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "smollm3", "qwen3_next"])
def test_layers_of_every_kind_are_measured(family: str) -> None:
    """Partial rotary, windows beside, no rotary, states beside."""
    exact = prefill(tiny_model(family), random_ids(40))
    found = moments_of([exact])
    for place, layer in enumerate(exact.layout.compressible):
        x = exact.keys(layer.index)[4:].flatten(1).double()
        torch.testing.assert_close(found.gram("key", place, 1), x.T @ x / len(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_likeness_is_linear_cka(prefills: list[Prefill], moments: Moments, kind: str) -> None:
    x = [rows(prefills, kind, place) for place in range(LAYERS)]
    expected = linear_cka(
        lambda layer, start, stop: x[layer][start:stop, None],
        range(LAYERS),
        [one.shape[1] for one in x],
        len(x[0]),
    )
    found = torch.tensor(layer_likeness(moments)[kind], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_likeness_says_nothing_of_layers_too_far_apart(prefills: list[Prefill]) -> None:
    matrix = layer_likeness(moments_of(prefills, reach=1))["key"]
    assert matrix[0][2] is None and matrix[2][0] is None
    assert matrix[0][1] == matrix[1][0] != None  # noqa: E711
