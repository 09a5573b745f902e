"""What tests of methods share: an exact prefix of a tiny model, and what a cache makes of later tokens."""

from __future__ import annotations

from typing import Any

import torch
from compressed import random_ids
from families import tiny_model
from transformers import Cache, PreTrainedModel

from xkv_service.evaluation.methods.base import Method
from xkv_service.prefilling.prefill import Prefill, prefill

TOKENS = 61
TAIL = 12
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
"""Full attention, norms on queries and keys, sliding layers and capped scores, sliding layers and sinks."""

SUFFIX = random_ids(7, seed=5)


def exact_prefix(family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, Prefill]:
    """A tiny model of 6 layers and a prefix of 61 tokens."""
    changes = {"num_hidden_layers": 6, **changes}
    if family in ("gemma2", "gpt_oss"):
        kinds = ["sliding_attention"] * 2 + ["full_attention"] * (changes["num_hidden_layers"] - 2)
        changes["layer_types"] = kinds
    model = tiny_model(family, **changes)
    return model, prefill(model, random_ids(TOKENS), tail=TAIL)


@torch.no_grad()
def logits_on(model: PreTrainedModel, cache: Cache, ids: torch.Tensor = SUFFIX) -> torch.Tensor:
    """Logits [n, vocabulary] of tokens run through a cache."""
    output: Any = model(ids[None], past_key_values=cache)
    logits: torch.Tensor = output.logits[0]
    return logits


def exact_logits(model: PreTrainedModel, exact: Prefill, ids: torch.Tensor = SUFFIX) -> torch.Tensor:
    """The same on the exact cache."""
    return logits_on(model, exact.cache(), ids)


def states_of(exact: Prefill) -> list[torch.Tensor]:
    """Copies of every key and value of the full-attention layers."""
    return [
        states.clone()
        for layer in exact.layout.compressible
        for states in (exact.rotated_keys(layer.index), exact.values(layer.index))
    ]


def check_prepared(method: Method, family: str) -> None:
    """What every method owes: see the assertions."""
    model, exact = exact_prefix(family)
    before, wanted = states_of(exact), exact_logits(model, exact)
    prepared = method.prepare(model, exact)
    assert all(torch.equal(a, b) for a, b in zip(states_of(exact), before, strict=True))
    assert torch.equal(exact_logits(model, exact), wanted)
    exact.free()

    # Caches of one prefix do not disturb each other, and positions go on behind the prefix.
    first, second = prepared.cache(), prepared.cache()
    assert first.get_seq_length() == prepared.tokens == TOKENS
    answer = logits_on(model, first)
    assert first.get_seq_length() == TOKENS + len(SUFFIX)
    assert torch.equal(logits_on(model, second), answer)

    # Token by token is as all at once, and a cropped tail leaves nothing behind.
    third = prepared.cache()
    steps = torch.cat([logits_on(model, third, token[None]) for token in SUFFIX])
    torch.testing.assert_close(steps, answer, atol=2e-4, rtol=1e-4)
    third.crop(-len(SUFFIX))
    assert third.get_seq_length() == TOKENS
    torch.testing.assert_close(logits_on(model, third), answer, atol=2e-4, rtol=1e-4)

    check_generation(model, prepared.cache(), prepared.cache())


def check_generation(model: PreTrainedModel, cache: Cache, other: Cache) -> None:
    """`generate` gives what stepping by hand gives."""
    ids = torch.cat((random_ids(TOKENS), SUFFIX))
    output: Any = model.generate(
        ids[None], past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    by_hand, new = [], SUFFIX
    for _ in range(4):
        scores = logits_on(model, other, new)[-1]
        scores[model.config.eos_token_id] = -torch.inf
        new = scores.argmax()[None]
        by_hand.append(int(new))
    assert output[0, len(ids) :].tolist() == by_hand
