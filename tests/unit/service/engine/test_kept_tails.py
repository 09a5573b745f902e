"""Whose tails go when a prefix is to make room."""

from __future__ import annotations

import pytest
from compressed import random_ids
from families import tiny_model
from transformers import DynamicCache

from xkv_service.engine.kept_tails import KeptTail, KeptTails, held_bytes
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


@pytest.mark.parametrize("answered", [1, 20, 63])
def test_of_many_conversations_about_a_document_the_right_one_goes_on(answered: int) -> None:
    """They share all full blocks with the prompt, and part behind them."""
    model, document = tiny_model("llama"), random_ids(128).tolist()
    cache = DynamicCache(config=model.config)
    model(random_ids(128)[None], past_key_values=cache)
    base, tails = Context(model, cache, document[:128]), KeptTails(1 << 24, "f" * 64)
    base.prefix_tokens = 64
    spoken = [[10 + number, *random_ids(answered - 1, seed=number).tolist()] for number in range(30)]
    for number, words in enumerate(spoken):
        context = base.fork()
        context.advance(words)
        tails.keep(context, "default", f"{number}")
    for number, words in enumerate(spoken):
        kept = tails.take([*document, *words, 5, 6], "default")
        assert kept is not None and kept.artifact_id == str(number)
        assert kept.context.ids.tolist() == [*document, *words]
        if answered > 2:
            part = tails.take([*document, *words[:-1]], "default")
            assert part is not None and part.artifact_id == str(number)
            assert part.context.ids.tolist() == [*document, *words[:-2]]
    other = tails.take([*document, 250, 251], "default")
    assert other is not None and other.context.ids.tolist() == document
    assert tails.take([*document[:127], 250, 251], "other") is None


def test_what_a_conversation_holds_has_its_token_ids() -> None:
    model, ids = tiny_model("llama"), random_ids(70)
    cache = DynamicCache(config=model.config)
    model(ids[None], past_key_values=cache)
    context = Context(model, cache, ids.tolist())
    context.prefix_tokens = 40
    states = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held_bytes(context) == states * 30 // 70 + 4 * 70
