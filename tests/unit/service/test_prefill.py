"""Prefill: exact, in chunks or batches, and without a trace left on the model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from families import FAMILIES, HYBRID, LATENT, tiny_model
from torch import nn
from transformers import PreTrainedModel

from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.prefilling import prefill_run
from xkv_service.prefilling.prefill import Prefill, prefill, prefill_batch

TOKENS = 40


def ids_of(tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 96, (tokens,), generator=torch.Generator().manual_seed(seed))


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def assert_same(one: Prefill, other: Prefill, tolerance: float = 2e-5) -> None:
    for layer in one.layout.compressible:
        assert (one.keys(layer.index) - other.keys(layer.index)).abs().max() <= tolerance
        assert (one.values(layer.index) - other.values(layer.index)).abs().max() <= tolerance
        error = one.query_energy(layer.index) - other.query_energy(layer.index)
        assert error.abs().max() <= tolerance * one.query_energy(layer.index).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_is_the_models_own_forward(family: str) -> None:
    model = tiny_model(family)
    prefix = prefill(model, ids_of(), chunk_tokens=16, tail=7)
    with torch.inference_mode():
        whole = model(ids_of()[None], use_cache=True)
    assert (prefix.logits_tail - whole.logits[0, -7:]).abs().max() <= 2e-5
    for layer in prefix.layout.compressible:
        cached = whole.past_key_values.layers[layer.index]
        assert (prefix.rotated_keys(layer.index) - cached.keys[0].transpose(0, 1)).abs().max() <= 2e-5
        assert (prefix.values(layer.index) - cached.values[0].transpose(0, 1)).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "phi", "cohere2", *LATENT, *HYBRID])
def test_the_model_goes_on_from_the_cache(family: str) -> None:
    model = tiny_model(family)
    prefix = prefill(model, ids_of(), chunk_tokens=16, tail=7)
    with torch.inference_mode():
        resumed = model(ids_of()[None, -7:], past_key_values=prefix.cache(TOKENS - 7)).logits[0]
        suffix = ids_of(5, seed=2)
        longer = model(torch.cat([ids_of(), suffix])[None]).logits[0, -5:]
        continued = model(suffix[None], past_key_values=prefix.cache()).logits[0]
    assert (resumed - prefix.logits_tail).abs().max() <= 2e-5
    assert (continued - longer).abs().max() <= 2e-5


def test_generation_from_the_cache_is_generation_from_the_prompt() -> None:
    model = tiny_model("llama")
    ids = ids_of()[None]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    prefix = prefill(model, ids_of()[:-1])
    assert torch.equal(model.generate(ids, past_key_values=prefix.cache(), **options), expected)


@pytest.mark.parametrize(
    "family", ["llama", "phi3-longrope", "mixtral", "smollm3", "gemma3", "deepseek_v3", "qwen3_next", "lfm2"]
)
def test_documents_in_a_batch_do_not_see_each_other(family: str) -> None:
    model = tiny_model(family)
    documents = [ids_of(TOKENS, 1), ids_of(31, 2), ids_of(9, 3)]
    tails = [7, 3, 0]
    together = prefill_batch(model, documents, chunk_tokens=16, tail=tails)
    for one, document, tail in zip(together, documents, tails, strict=True):
        alone = prefill(model, document, chunk_tokens=16, tail=tail)
        assert torch.equal(one.token_ids, document)
        assert_same(one, alone)
        if tail:
            assert (one.logits_tail - alone.logits_tail).abs().max() <= 2e-5
        else:
            assert one.logits_tail is None


def test_documents_in_a_batch_share_their_storage() -> None:
    one, other = prefill_batch(tiny_model("llama"), [ids_of(20), ids_of(10)])
    storages = {prefix.values(0).untyped_storage().data_ptr() for prefix in (one, other)}
    assert len(storages) == 1


def test_longrope_documents_on_both_sides_of_the_window() -> None:
    model = tiny_model("phi3-longrope")
    documents = [ids_of(150, 1), ids_of(60, 2)]
    together = prefill_batch(model, documents, chunk_tokens=32)
    for one, document in zip(together, documents, strict=True):
        assert_same(one, prefill(model, document))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gpt_oss"])
def test_query_energy_is_the_mean_square_of_rotated_queries(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    layout = inspect_loaded(model).layout
    queries = _queries_seen_by_attention(model, monkeypatch)
    prefix = prefill(model, ids_of(), chunk_tokens=16)
    for layer in layout.compressible:
        expected = queries[layer.index].square().mean(1)
        found = prefix.query_energy(layer.index)
        assert found.dtype == torch.float32
        assert found.shape == (layer.query_heads, layer.head_dim)
        assert (found - expected).abs().max() <= 1e-5 * expected.max()


def _queries_seen_by_attention(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Per layer, the rotated queries [heads, T, D] of one plain forward."""
    seen: list[torch.Tensor] = []
    eager = model.config._attn_implementation == "eager"
    owner: Any = sys.modules[type(model).__module__] if eager else nn.functional
    name = "eager_attention_forward" if eager else "scaled_dot_product_attention"
    original = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1][0] if eager else args[0][0])
        return original(*args, **kwargs)

    with monkeypatch.context() as patched, torch.inference_mode():
        patched.setattr(owner, name, spy)
        model(ids_of()[None])
    return seen


def test_replaced_keys_and_values_are_what_the_model_sees() -> None:
    model = tiny_model("llama")
    prefix = prefill(model, ids_of(), tail=7)
    other = prefill(model, ids_of(seed=5), tail=7)
    for layer in range(3):
        prefix.replace(layer, other.keys(layer, 0, 33), other.values(layer, 0, 33))
    mixed = torch.cat([ids_of(seed=5)[:33], ids_of()[33:]])
    with torch.inference_mode():
        found = model(ids_of()[None, -7:], past_key_values=prefix.cache(33)).logits[0]
        expected = model(mixed[None]).logits[0, -7:]
    assert (found - expected).abs().max() <= 2e-5


def test_replacing_with_the_own_keys_changes_nothing() -> None:
    prefix = prefill(tiny_model("phi"), ids_of())
    before = prefix.rotated_keys(1).clone()
    prefix.replace(1, prefix.keys(1, 5, 20), prefix.values(1, 5, 20).clone(), start=5)
    assert (prefix.rotated_keys(1) - before).abs().max() <= 1e-5


def test_sliding_windows_are_those_of_the_models_own_cache() -> None:
    model = tiny_model("gemma3")
    prefix = prefill(model, ids_of(), chunk_tokens=16, tail=7)
    with torch.inference_mode():
        own = model(ids_of()[None], use_cache=True).past_key_values.layers[0]
    keys, values = prefix.window(0)
    assert (keys - own.keys[0].transpose(0, 1)).abs().max() <= 2e-5
    assert (values - own.values[0].transpose(0, 1)).abs().max() <= 2e-5
    with pytest.raises(ValueError, match="known at 40 and 33 only"):
        prefix.cache(20)


@pytest.mark.parametrize("family", HYBRID)
def test_states_are_those_of_the_models_own_cache(family: str) -> None:
    model = tiny_model(family)
    prefix = prefill(model, ids_of(), chunk_tokens=16, tail=7)
    with torch.inference_mode():
        own = model(ids_of()[None], use_cache=True).past_key_values
    for layer in prefix.layout.states:
        state, kept = prefix.state(layer.layer), own.layers[layer.layer]
        assert state.layout(layer.layer) == layer
        for number, conv in enumerate(state.conv):
            assert (conv - kept.conv_states[number][0]).abs().max() <= 2e-5
        for number, recurrent in enumerate(state.recurrent):
            expected = kept.recurrent_states[number][0]
            assert (recurrent - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))
    with pytest.raises(ValueError, match="known at 40 and 33 only"):
        prefix.cache(20)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_going_on_from_a_cache_leaves_the_prefills_states_alone(family: str) -> None:
    model = tiny_model(family)
    prefix = prefill(model, ids_of(), tail=7)
    suffix = ids_of(5, seed=2)[None]
    with torch.no_grad():
        first = model(suffix, past_key_values=prefix.cache()).logits
        assert torch.equal(model(suffix, past_key_values=prefix.cache()).logits, first)


def test_a_cache_outgrowing_its_storage_still_works() -> None:
    model = tiny_model("llama")
    ids = ids_of(60)
    prefix = prefill(model, ids[:TOKENS])
    with torch.inference_mode():
        found = model(ids[None, TOKENS:], past_key_values=prefix.cache()).logits
        expected = model(ids[None]).logits[:, TOKENS:]
    assert (found - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_no_trace_is_left_on_the_model(family: str) -> None:
    model = tiny_model(family)
    before = (hooks_of(model), model.config._attn_implementation)
    prefill(model, ids_of(), chunk_tokens=16)
    assert (hooks_of(model), model.config._attn_implementation) == before


def test_no_trace_is_left_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    inspect_loaded(model)
    before = (hooks_of(model), model.config._attn_implementation)

    def fail(*args: Any, **kwargs: Any) -> None:
        assert hooks_of(model) > before[0]
        raise MemoryError("out of memory")

    monkeypatch.setattr(model.model.layers[2].mlp, "forward", fail)
    with pytest.raises(MemoryError):
        prefill(model, ids_of())
    assert (hooks_of(model), model.config._attn_implementation) == before


def test_training_mode_is_restored_and_not_used() -> None:
    model = tiny_model("llama", attention_dropout=0.9)
    expected = prefill(model, ids_of())
    model.train()
    assert_same(prefill(model, ids_of()), expected)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_fused_chunks_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path meant for CUDA, on the CPU, where PyTorch builds the mask itself."""
    model = tiny_model(family)
    expected = prefill(model, ids_of(), chunk_tokens=16, tail=7)
    monkeypatch.setattr(prefill_run, "can_fuse_chunks", lambda *args: True)
    fused = prefill(model, ids_of(), chunk_tokens=16, tail=7)
    assert_same(fused, expected)
    assert (fused.logits_tail - expected.logits_tail).abs().max() <= 2e-5


def test_only_the_logits_asked_for_are_computed() -> None:
    model = tiny_model("llama")
    inspect_loaded(model)
    rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    prefill(model, ids_of(), chunk_tokens=8, tail=3)
    handle.remove()
    assert rows == [1, 1, 1, 1, 3]


def test_the_exact_cache_is_held_once() -> None:
    prefix = prefill(tiny_model("llama", dtype=torch.bfloat16), ids_of(), chunk_tokens=16)
    assert prefix.values(0).dtype == torch.bfloat16
    cache = prefix.cache(20)
    assert cache.layers[0].keys.data_ptr() == prefix.rotated_keys(0).data_ptr()
    assert prefix.values(0).untyped_storage().nbytes() == TOKENS * 2 * 16 * 2


@pytest.mark.parametrize(
    ("ids", "tail", "reason"),
    [
        ([], 0, "no tokens"),
        ([1, 2], 2, "tail=2"),
        ([1, 2], -1, "tail=-1"),
        (torch.ones(2, 30, dtype=torch.int64), 0, r"shape \[2, 30\]"),
        (torch.ones(1, 1, 30, dtype=torch.int64), 0, r"shape \[1, 1, 30\]"),
        (torch.tensor(7), 0, r"shape \[\]"),
        ([1.5, 2.5], 0, "float32"),
        ([True, False], 0, "bool"),
        (["one", "two"], 0, "not token ids"),
        ([[1, 2], [3]], 0, "not token ids"),
        ([1, 2**70], 0, "not token ids"),
        ([5, -1], 0, "token id -1 "),
        ([5, 96], 0, "token id 96 .* 96"),
        ([5] * 513, 0, "513 tokens, .* 512"),
    ],
)
def test_bad_input_is_refused(ids: Any, tail: int, reason: str) -> None:
    with pytest.raises(InvalidPrompt, match=reason):
        prefill(tiny_model("llama"), ids, tail=tail)


def test_a_whole_window_of_the_last_id_is_not_refused() -> None:
    assert prefill(tiny_model("llama"), [[95] * 512]).tokens == 512  # type: ignore[list-item]


def test_an_empty_batch_and_a_single_token() -> None:
    model = tiny_model("llama")
    assert prefill_batch(model, []) == []
    prefix = prefill(model, [5])
    assert prefix.keys(0).shape == (1, 2, 16)
    assert prefix.rotary(0).rotate(prefix.keys(0), torch.zeros(1, dtype=torch.int64)).shape == (1, 2, 16)


def test_freed_prefixes_hold_nothing() -> None:
    prefix = prefill(tiny_model("llama"), ids_of(), tail=3)
    prefix.free()
    assert prefix.logits_tail is None
    with pytest.raises(KeyError):
        prefix.keys(0)
