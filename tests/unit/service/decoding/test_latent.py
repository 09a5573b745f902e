"""Latent attention (MLA): the factors themselves are the selection index."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import LATENT, tiny_model

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import latent
from xkv_service.decoding.prefix import Prefix
from xkv_service.errors import InvalidSpec, UnsupportedModel
from xkv_service.reconstruct import dense_cache

IDS = random_ids(60)
SPEC = CompressionSpec(group_size=2, rank_k=24, rank_v=24, dtype="float32", factor_dtype="float32", sink=3)


@pytest.mark.parametrize("family", LATENT)
def test_scores_by_every_column_are_the_scores_of_rebuilt_keys(family: str) -> None:
    model = tiny_model(family)
    prefix = Prefix.of(model, compress(model, IDS, SPEC)).layers[1]
    heads, dim = prefix.value_bases.shape[0], prefix.exact_keys.shape[2]
    queries = torch.randn(heads, 5, dim, generator=torch.Generator().manual_seed(0))
    assert prefix.index is not None
    found = prefix.index(queries)
    expected = queries @ prefix.keys(torch.arange(60)).permute(1, 2, 0)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_leading_columns_score_the_best_approximation_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "INDEX_RANK", 5)
    model = tiny_model("deepseek_v3")
    factors = compress(model, IDS, SPEC)
    prefix = Prefix.of(model, factors).layers[1]
    group, place = factors.locate(1)
    latents = (group.keys.factors[:, :5] @ group.keys.layer_bases(place)[:5])[None, None]
    with torch.no_grad():
        keys, _ = model.model.layers[1].self_attn.expand_kv(latents, factors.rope_keys[1][None, None])
    queries = torch.randn(4, 5, keys.shape[-1], generator=torch.Generator().manual_seed(0))
    assert prefix.index is not None
    torch.testing.assert_close(prefix.index(queries), queries @ keys[0].mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_a_budget_saves_rebuilding_and_the_exact_scores_choose_alike(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad(), enable_xkv(model):
        factors = compress(model, IDS, SPEC)
        logits = []
        for selector in ("auto", "exact"):
            cache = XKVCache.from_factors(model, factors, SelectionSpec(selector, budget=9, recent=0))  # type: ignore[arg-type]
            logits.append(model(IDS[None, :1], past_key_values=cache).logits)
            assert cache.rebuilt_tokens == 9
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3", "kimi_linear"])
def test_few_ranks_of_8_bits_decode_as_the_dense_rebuild_does(family: str) -> None:
    model, suffix = tiny_model(family), IDS[None, :5]
    factors = compress(model, IDS, CompressionSpec(rank_k=12, rank_v=12, group_size=2))
    with torch.no_grad(), enable_xkv(model):
        rebuilt = model(suffix, past_key_values=dense_cache(model, factors)).logits
        found = model(
            suffix, past_key_values=XKVCache.from_factors(model, factors, SelectionSpec("dense"))
        ).logits
        exact = model(torch.cat([IDS[None], suffix], 1)).logits[:, 60:]
    torch.testing.assert_close(found, rebuilt, atol=1e-5 * float(rebuilt.abs().max()), rtol=0)
    assert (found - exact).abs().max() > 100 * (found - rebuilt).abs().max()


def test_a_named_index_is_refused() -> None:
    model = tiny_model("deepseek_v3")
    with pytest.raises(InvalidSpec, match="made without that index"):
        XKVCache.from_factors(model, compress(model, IDS, SPEC), SelectionSpec("sketch"))


def test_a_bias_in_the_expansion_is_refused() -> None:
    model = tiny_model("deepseek_v3")
    projection = model.model.layers[0].self_attn.kv_b_proj
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))
    with pytest.raises(UnsupportedModel, match="adds a bias"):
        Prefix.of(model, compress(model, IDS, SPEC))
