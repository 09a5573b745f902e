"""Layers that the methods leave alone or know nothing of: linear-attention states and latents."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from prefixes import TAIL, TOKENS, exact_logits, logits_on, states_of

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.registry import make_method
from xkv_service.prefilling.prefill import prefill


@pytest.mark.parametrize("method", ["minicache:start=0,gamma=1", "snapkv:ratio=1", "quantized:residual=99"])
def test_linear_attention_states_are_kept_and_not_shared(method: str) -> None:
    model = tiny_model("qwen3_next")
    exact = prefill(model, random_ids(TOKENS), tail=TAIL)
    before, wanted = states_of(exact), exact_logits(model, exact)
    prepared = make_method(method).prepare(model, exact)
    assert all(torch.equal(a, b) for a, b in zip(states_of(exact), before, strict=True))
    for _ in range(2):
        torch.testing.assert_close(logits_on(model, prepared.cache()), wanted)
    if not method.startswith("minicache"):  # it stores the merged directions besides
        assert prepared.nbytes == exact.layout.bytes_full(TOKENS)


@pytest.mark.parametrize("method", ["minicache:start=0,gamma=1", "quantized:residual=99"])
def test_latents_are_held_like_keys(method: str) -> None:
    model = tiny_model("deepseek_v3")
    exact = prefill(model, random_ids(TOKENS))
    prepared = make_method(method).prepare(model, exact)
    torch.testing.assert_close(logits_on(model, prepared.cache()), exact_logits(model, exact))


def test_snapkv_refuses_latents() -> None:
    model = tiny_model("deepseek_v3")
    with pytest.raises(InvalidSpec, match="latents"):
        make_method("snapkv").prepare(model, prefill(model, random_ids(TOKENS)))
