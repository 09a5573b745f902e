"""Whose tails go when a prefix is to make room."""

from __future__ import annotations

from compressed import random_ids
from families import tiny_model
from transformers import DynamicCache

from xkv_service.engine.kept_tails import KeptTail, KeptTails
from xkv_service.sessions.context import Context


def test_a_prefix_that_would_stay_keeps_its_tails() -> None:
    model, gone = tiny_model("llama"), list[str]()

    def on_evict(kept: KeptTail) -> None:
        assert kept.artifact_id is not None
        gone.append(kept.artifact_id)

    tails = KeptTails(1 << 24, "f" * 64, on_evict=on_evict)
    for seed, artifact_id in enumerate("aabbc"):
        ids = random_ids(70, seed=seed)
        cache = DynamicCache(config=model.config)
        model(ids[None], past_key_values=cache)
        tails.keep(Context(model, cache, ids.tolist()), "default", artifact_id)
    assert tails.free_a_prefix({"a"}) and gone == ["b", "b"]
    assert tails.free_a_prefix({"a"}) and gone == ["b", "b", "c"]
    assert not tails.free_a_prefix({"a"}) and len(tails) == 2
    assert tails.free_a_prefix() and len(tails) == 0
