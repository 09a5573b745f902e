"""A tail that is folded into factors: the same answers within the error asked for, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding.fold import fold_rows
from xkv_service.errors import CacheMisuse, InvalidSpec, UnsupportedModel
from xkv_service.factors import PrefixFactors


def _logits(model: PreTrainedModel, cache: XKVCache, seed: int = 50) -> torch.Tensor:
    logits: torch.Tensor = model(random_ids(4, seed=seed)[None], past_key_values=cache.fork()).logits
    return logits


def _talked(model: PreTrainedModel, factors: PrefixFactors, tokens: int, spec: SelectionSpec) -> XKVCache:
    cache = XKVCache.from_factors(model, factors, spec)
    model(random_ids(tokens, seed=tokens)[None], past_key_values=cache)
    return cache


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the rounding of factors to 8 bits."""
    torch.testing.assert_close(found, expected, atol=0.03 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("error", [0.3, 0.05, 0.001])
def test_rows_reach_the_error_asked_for(error: float) -> None:
    make = torch.Generator().manual_seed(0)
    bases = torch.randn(8, 48, generator=make) * torch.logspace(2, -2, 8)[:, None]
    states = torch.randn(30, 8, generator=make) @ bases + 0.2 * torch.randn(30, 48, generator=make)
    folded = fold_rows(states, bases, error)
    rows = folded.rows(torch.arange(30), torch.float32)
    rebuilt = rows @ torch.cat([bases, folded.extra_bases.float()])
    assert float((rebuilt - states).norm() / states.norm()) < error + 0.02
    assert len(folded.extra_bases) < 30


def test_states_the_bases_know_add_no_rank() -> None:
    bases = torch.randn(6, 20)
    assert len(fold_rows(torch.randn(9, 6) @ bases, bases, 0.01).extra_bases) == 0


def test_a_folded_tail_answers_the_same(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = _talked(enabled, lossy, 20, SelectionSpec("dense"))
    folded = cache.fork()
    assert folded.fold(keep=6, error=1e-4) == 14
    assert (folded.tail_tokens, folded.folded_tokens, folded.get_seq_length()) == (6, 14, 68)
    _assert_close(_logits(enabled, folded), _logits(enabled, cache))
    assert cache.tail_tokens == 20


def test_folding_again_and_again(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = _talked(enabled, lossy, 10, SelectionSpec("dense"))
    plain = cache.fork()
    for turn in range(3):
        cache.fold(keep=2, error=1e-4)
        for one in (cache, plain):
            enabled(random_ids(9, seed=turn)[None], past_key_values=one)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert cache.tail_tokens == 11
    expected = _logits(enabled, plain)
    _assert_close(_logits(enabled, cache), expected)


def test_folded_tokens_can_be_selected(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = _talked(enabled, lossy, 30, SelectionSpec(budget=60, recent=0))
    cache.fold(keep=4, error=0.1)
    enabled(random_ids(1)[None], past_key_values=cache)
    assert 44 < cache.rebuilt_tokens <= 70


def test_a_coarse_fold_takes_fewer_bytes(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    sizes = []
    for error in (0.5, 0.2):
        cache = _talked(enabled, lossy, 64, SelectionSpec("dense"))
        full = cache.tail_bytes
        cache.fold(error=error)
        sizes.append(cache.tail_bytes)
    assert sizes[0] < sizes[1] < full / 2


def test_nothing_to_fold(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = XKVCache.from_factors(enabled, lossy)
    assert cache.fold() == 0
    enabled(random_ids(3)[None], past_key_values=cache)
    assert cache.fold(keep=3) == 0
    assert cache.folded_tokens == 0


def test_forks_and_resets_keep_the_shared_prefix(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = _talked(enabled, lossy, 12, SelectionSpec("dense"))
    fresh = _logits(enabled, XKVCache.from_factors(enabled, lossy, SelectionSpec("dense")))
    cache.fold(error=0.1)
    fork = cache.fork()
    assert fork.folded_tokens == 12
    cache.reset()
    assert (cache.get_seq_length(), cache.folded_tokens) == (48, 0)
    torch.testing.assert_close(_logits(enabled, cache), fresh)
    assert fork.folded_tokens == 12


def test_what_cannot_be_folded(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = XKVCache.from_factors(enabled, lossy)
    enabled(torch.stack([random_ids(4), random_ids(4)]), past_key_values=cache)
    with pytest.raises(CacheMisuse, match="2 rows"):
        cache.fold()
    with pytest.raises(InvalidSpec, match="error=0"):
        cache.fold(error=0)
    for keep in (-1, 1.5, True):
        with pytest.raises(InvalidSpec, match=f"keep={keep}"):
            cache.fold(keep=keep)  # type: ignore[arg-type]
    marked = compress(enabled, random_ids(48), CompressionSpec(rank_k=8, rank_v=8, index="landmark"))
    cache = _talked(enabled, marked, 5, SelectionSpec())
    with pytest.raises(UnsupportedModel, match="landmarks"):
        cache.fold()


def test_cropping_into_folded_tokens_is_refused(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = _talked(enabled, lossy, 10, SelectionSpec())
    cache.fold(keep=2)
    with pytest.raises(CacheMisuse, match="reaches into the prefix"):
        cache.crop(-3)


@pytest.mark.parametrize("family", ["gemma2", "smollm3", "llama-yarn"])
def test_families_fold(family: str) -> None:
    model = tiny_model(family)
    spec = CompressionSpec(
        group_size=2, rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32"
    )
    with torch.no_grad(), enable_xkv(model):
        cache = _talked(model, compress(model, random_ids(48), spec), 20, SelectionSpec("dense"))
        expected = _logits(model, cache)
        cache.fold(keep=3, error=1e-4)
        found = _logits(model, cache)
    _assert_close(found, expected)
