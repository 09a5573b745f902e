"""With full ranks and every token selected, a cache of factors is the exact cache: in every family."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import FAMILIES, tiny_model
from transformers import DynamicCache, PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.selection.spec import SelectorKind

LOSSLESS = CompressionSpec(
    group_size=2, rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32", index="sketch"
)
PREFIX, SUFFIX = 40, 6
TOLERANCE = 1e-5  # of the largest logit


def _exact_cache(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids[None], past_key_values=cache)
    return cache


def _select_every_token(cache: XKVCache) -> None:
    """A budget of every token is a shortcut to none; here each of them is scored and chosen."""
    for layer in cache.layers:
        if isinstance(layer, PrefixLayer):
            layer.selection.dense = False
            layer.selection.budget = layer.selection.choosable


@pytest.mark.parametrize("selector", ["dense", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_exact_caches(family: str, selector: SelectorKind) -> None:
    model, ids = tiny_model(family), random_ids(PREFIX + SUFFIX + 3)
    prefix, suffix, rest = ids.split([PREFIX, SUFFIX, 3])
    with torch.no_grad(), enable_xkv(model):
        factors = compress(model, prefix, LOSSLESS)
        ours = XKVCache.from_factors(model, factors, SelectionSpec(selector, 1.0, recent=0))
        if selector != "dense":
            _select_every_token(ours)
        exact = _exact_cache(model, prefix)
        for part in (suffix, *rest.split(1)):
            expected = model(part[None], past_key_values=exact).logits
            found = model(part[None], past_key_values=ours).logits
            torch.testing.assert_close(found, expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)
    assert ours.get_seq_length() == len(ids)
