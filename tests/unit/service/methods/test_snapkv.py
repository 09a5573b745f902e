"""SnapKV: the tokens that the window attends to are kept, positions go on as if nothing were gone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressed import random_ids
from prefixes import FAMILIES, TAIL, TOKENS, check_prepared, exact_logits, exact_prefix, logits_on

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.registry import make_method
from xkv_service.evaluation.methods.snapkv import SnapKV, WindowQueries, select, window_attention
from xkv_service.prefilling.prefill import prefill


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selected_prefix_serves_a_chat(family: str) -> None:
    check_prepared(SnapKV(ratio=3, window=8), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_token_is_exact(family: str) -> None:
    model, exact = exact_prefix(family)
    prepared = SnapKV(ratio=1).prepare(model, exact)
    torch.testing.assert_close(logits_on(model, prepared.cache()), exact_logits(model, exact))


def test_attention_by_hand() -> None:
    # One KV head, one query head, D = 1: scores are q k, the window is the last two of four tokens.
    keys = torch.tensor([1.0, 2.0, 0.0, 3.0]).view(4, 1, 1)
    queries = torch.tensor([1.0, -1.0]).view(1, 2, 1)
    first = [math.exp(x) for x in (1.0, 2.0, 0.0)]  # sees three tokens
    second = [math.exp(-x) for x in (1.0, 2.0, 0.0, 3.0)]
    wanted = [first[i] / sum(first) + second[i] / sum(second) for i in range(2)]
    received = window_attention(WindowQueries(queries, 1.0), keys)
    torch.testing.assert_close(received, torch.tensor([wanted]))


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_attention_is_the_models_own(family: str) -> None:
    model, exact = exact_prefix(family, attn_implementation="eager")
    with torch.no_grad():
        output: Any = model(exact.token_ids[None], output_attentions=True)
    window = 6
    method = SnapKV(budget=window + 5, window=window, kernel=1)
    prepared = method.prepare(model, exact)
    for layer in exact.layout.compressible:
        attention = output.attentions[layer.index][0, :, -window:, :-window].sum(1)
        received = attention.view(layer.kv_heads, -1, TOKENS - window).mean(1)
        best = received.topk(5).indices.sort(-1).values
        for head in range(layer.kv_heads):
            positions = [*best[head].tolist(), *range(TOKENS - window, TOKENS)]
            kept = prepared.kept[layer.index][0][0, head]
            assert torch.equal(kept, exact.rotated_keys(layer.index)[positions, head])


def test_pooling_keeps_neighbours_of_a_peak() -> None:
    scores = torch.zeros(1, 20)
    scores[0, 10] = 1.0
    assert select(scores, 3, 4, 3).tolist() == [[9, 10, 11, 20, 21, 22, 23]]
    assert 10 in select(scores, 1, 4, 1)[0].tolist()


def test_bytes_are_those_of_the_tensors() -> None:
    model, exact = exact_prefix()
    prepared = SnapKV(budget=20, window=8).prepare(model, exact)
    assert prepared.nbytes == 6 * 2 * 20 * 32 * 2
    held = prepared.cache()
    assert prepared.nbytes == sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in held.layers)
    hybrid, exact = exact_prefix("gemma2")
    window = 2 * 2 * (8 - 1) * 32 * 2
    assert SnapKV(budget=20, window=8).prepare(hybrid, exact).nbytes == 4 * 2 * 20 * 32 * 2 + window


def test_the_tail_can_be_cropped_and_the_prefix_cannot() -> None:
    model, exact = exact_prefix()
    cache = SnapKV(ratio=4, window=8).prepare(model, exact).cache()
    logits_on(model, cache)
    with pytest.raises(ValueError, match="reaches into the prefix"):
        cache.crop(-8)


def test_the_window_is_shortened_to_what_was_prefilled() -> None:
    model, exact = exact_prefix("gemma2")
    assert SnapKV(ratio=2, window=32)._window(exact) == TAIL
    with pytest.raises(InvalidSpec, match="nothing to observe"):
        SnapKV().prepare(model, prefill(model, random_ids(40)))


def test_options_come_from_a_text_and_are_checked() -> None:
    method = make_method("snapkv:ratio=4,budget=64,window=16,kernel=7")
    assert isinstance(method, SnapKV)
    assert (method.ratio, method.budget, method.window, method.kernel) == (4.0, 64, 16, 7)
    for bad in ("ratio=0.5", "ratio=nan", "budget=8", "window=0", "kernel=4"):
        with pytest.raises(InvalidSpec):
            make_method(f"snapkv:{bad}")
