"""States of linear-attention layers change in place: every session has its own."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_service import CompressionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding.prefix import Prefix
from xkv_service.errors import InvalidSpec

IDS = random_ids(60)
SPEC = CompressionSpec(group_size=2, rank_k=24, rank_v=24)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "kimi_linear"])
def test_sessions_do_not_share_states(family: str) -> None:
    model, one, other = tiny_model(family), IDS[None, :4], IDS[None, 4:8]
    with torch.no_grad(), enable_xkv(model):
        prefix = Prefix.of(model, compress(model, IDS, SPEC))
        first = model(one, past_key_values=XKVCache(prefix)).logits
        cache = XKVCache(prefix)
        model(other, past_key_values=cache)
        fork = cache.fork()
        ahead = model(one, past_key_values=cache).logits
        torch.testing.assert_close(model(one, past_key_values=fork).logits, ahead)
        cache.reset()
        torch.testing.assert_close(model(one, past_key_values=cache).logits, first)
        rows = XKVCache(prefix)
        both = model(torch.cat([one, other]), past_key_values=rows).logits
        torch.testing.assert_close(both[:1], first, atol=1e-5, rtol=1e-5)
        rows.reorder_cache(torch.tensor([1, 1]))
        last = model(torch.cat([one, one]), past_key_values=rows).logits
        torch.testing.assert_close(last[:1], ahead, atol=1e-5, rtol=1e-5)


def test_a_prefix_with_states_is_used_whole() -> None:
    model = tiny_model("qwen3_next")
    with pytest.raises(InvalidSpec, match="linear-attention states are known after all 60 tokens"):
        XKVCache.from_factors(model, compress(model, IDS, SPEC), tokens=40)
