"""Fidelity: the numbers, and that they are measured on what is stored."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_service.compression import compress_prefill, factorize_prefill
from xkv_service.fidelity import compare_distributions, held_back
from xkv_service.prefilling.prefill import prefill
from xkv_service.reconstruct import dense_cache, rebuild
from xkv_service.spec import CompressionSpec


def test_an_eighth_is_held_back_and_at_most_64() -> None:
    assert [held_back(tokens) for tokens in (1, 2, 7, 16, 512, 100_000)] == [0, 1, 1, 2, 64, 64]


def test_equal_distributions_agree() -> None:
    logits = torch.randn(5, 30)
    assert compare_distributions(logits, logits + 3.0) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_kl_is_in_nats_from_the_exact_distribution() -> None:
    exact, other = (
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(),
        torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log(),
    )
    agreement, kl = compare_distributions(exact, other)
    assert kl == pytest.approx(0.5 * (0.5 * torch.log(torch.tensor(4 / 3)).item()), abs=1e-6)
    assert agreement == 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fidelity_is_what_a_reader_of_the_artifact_would_measure(family: str) -> None:
    """The certificate equals a run of the held-back tokens over the cache rebuilt from the factors."""
    model, ids = tiny_model(family), random_ids(160)
    spec = CompressionSpec(rank_k=12, rank_v=12, group_size=2)
    exact = prefill(model, ids, tail=held_back(160))
    factors = compress_prefill(model, exact, spec)
    fidelity = factors.fidelity
    assert fidelity is not None
    assert fidelity.positions == 20
    assert fidelity.kl > 1e-5
    if factors.windows:
        return
    with torch.inference_mode():
        expected = model(input_ids=ids[None]).logits[0, 140:]
        logits = model(input_ids=ids[None, 140:], past_key_values=dense_cache(model, factors, 140)).logits[0]
    agreement, kl = compare_distributions(expected, logits)
    assert fidelity.top1_agreement == agreement
    assert fidelity.kl == pytest.approx(kl, rel=1e-3)


def test_reconstruction_errors_are_those_of_the_rebuilt_cache() -> None:
    model, ids = tiny_model("llama"), random_ids(160)
    spec = CompressionSpec(
        rank_k=10,
        rank_v=20,
        group_size=2,
        dtype="float32",
        factor_dtype="float32",
        sink=2,
        value_weights="output",
    )
    exact = prefill(model, ids)
    factors, errors = factorize_prefill(model, exact, spec)
    for group, key_error, value_error in zip(
        factors.groups, errors.key_error, errors.value_error, strict=True
    ):
        pairs = [
            (rebuild(factors, layer), (exact.keys(layer), exact.values(layer)))
            for layer in group.layout.layers
        ]
        for kind, reported in ((0, key_error), (1, value_error)):
            rebuilt = torch.cat([made[kind][2:].flatten(1) for made, _ in pairs], 1)
            true = torch.cat([known[kind][2:].flatten(1) for _, known in pairs], 1)
            assert reported == pytest.approx(float((rebuilt - true).norm() / true.norm()), rel=1e-3)


def test_tokens_that_cannot_come_and_what_is_no_number_are_told_apart() -> None:
    """A model may rule tokens out with -inf; NaN is never a good answer."""
    exact = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, -torch.inf]])
    same = compare_distributions(exact, exact)
    assert same == (1.0, 0.0)
    assert compare_distributions(exact[:, :2], exact[:, :2].flip(1))[1] > 0.5
    assert compare_distributions(exact, torch.full_like(exact, torch.nan))[1] == torch.inf
    assert compare_distributions(torch.full_like(exact, torch.nan), exact)[1] == torch.inf
    assert compare_distributions(torch.zeros(1, 3), exact[:1])[1] == torch.inf
