"""Probes run behind a prefix as if the model had read both, and leave the cache as it was."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.probes import Probe, ProbedPrefix, exact_cache, predictions
from xkv_service.prefilling.prefill import prefill

PROBES = [Probe(tuple(random_ids(9, seed=1).tolist()), 9), Probe(tuple(random_ids(5, seed=2).tolist()), 2)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next", "lfm2"])
def test_predictions_are_those_of_prefix_and_probe_in_one_run(family: str) -> None:
    """Windows and states, which the model changes in place, serve every probe from where the prefix ended."""
    model, prefix = tiny_model(family), random_ids(40)
    cache = exact_cache(prefill(model, prefix))
    found = predictions(model, cache, PROBES)
    assert torch.equal(predictions(model, cache, PROBES), found)
    assert found.shape[0] == 11
    with torch.no_grad():
        expected = torch.cat(
            [
                model(torch.cat([prefix, torch.tensor(one.token_ids)])[None]).logits[0, -one.counted :]
                for one in PROBES
            ]
        )
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_a_cache_of_factors_serves_every_probe() -> None:
    model = tiny_model("llama")
    factors = compress(model, random_ids(40), CompressionSpec(rank_k=9, rank_v=9))
    cache = XKVCache.from_factors(model, factors, SelectionSpec("dense"))
    with enable_xkv(model):
        both, last = predictions(model, cache, PROBES), predictions(model, cache, PROBES[1:])
    assert torch.equal(both[9:], last)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize(("tokens", "tail"), [(2, 1), (8, 1), (80, 10), (1000, 64)])
def test_a_text_without_questions_is_asked_its_own_end(tokens: int, tail: int) -> None:
    document = ProbedPrefix.of_text("text", range(tokens))
    (probe,) = document.probes
    assert (*document.token_ids, *probe.token_ids) == tuple(range(tokens))
    assert len(probe.token_ids) == probe.counted == tail
