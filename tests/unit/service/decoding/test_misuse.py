"""Wrong use of a cache of factors is an error that says what to do, before any wrong token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.errors import CacheMisuse, InvalidSpec, ModelMismatch, UnsupportedModel
from xkv_service.factors import PrefixFactors


def test_a_model_that_is_not_enabled(model: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = XKVCache.from_factors(model, lossy)
    with pytest.raises(CacheMisuse, match="without the prefix"), torch.no_grad():
        model(random_ids(3)[None], past_key_values=cache)


@pytest.mark.parametrize("new", [5, 48, 60])
def test_suffix_ids_without_a_mask(enabled: PreTrainedModel, lossy: PrefixFactors, new: int) -> None:
    """60 ids could be all of them, but do not begin with the prefix."""
    with pytest.raises(CacheMisuse, match="without a mask|do not begin"):
        enabled.generate(
            random_ids(new, seed=9)[None],
            past_key_values=XKVCache.from_factors(enabled, lossy),
            max_new_tokens=1,
        )


def test_a_mask_over_the_suffix_alone(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    ids, cache = random_ids(5)[None], XKVCache.from_factors(enabled, lossy)
    with pytest.raises(CacheMisuse, match="with a mask of 5 columns"):
        enabled.generate(ids, attention_mask=torch.ones(1, 5), past_key_values=cache, max_new_tokens=1)
    with pytest.raises(CacheMisuse, match="9 columns for 5 ids"):
        enabled.generate(ids, attention_mask=torch.ones(1, 9), past_key_values=cache, max_new_tokens=1)
    with pytest.raises(CacheMisuse, match="5 columns, but 48 tokens"):
        enabled(ids, attention_mask=torch.ones(1, 5), past_key_values=cache)
    assert cache.tail_tokens == 0


def test_embeddings_of_the_suffix_alone(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    """Transformers takes away as many as are cached."""
    embeddings = enabled.get_input_embeddings()(random_ids(5)[None])
    with pytest.raises(CacheMisuse, match="no token behind the 48"):
        enabled.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(1, 53),
            past_key_values=XKVCache.from_factors(enabled, lossy),
            max_new_tokens=1,
        )


def test_ids_of_another_document(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    ids = torch.cat([prefix_ids, random_ids(4)])
    ids[20] = (ids[20] + 1) % 90 + 3
    with pytest.raises(CacheMisuse, match="do not begin"):
        enabled.generate(ids[None], past_key_values=XKVCache.from_factors(enabled, lossy), max_new_tokens=1)


def test_ids_of_another_conversation(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    cache = XKVCache.from_factors(enabled, lossy)
    enabled(random_ids(6, seed=3)[None], past_key_values=cache)
    said = torch.cat([prefix_ids, random_ids(6, seed=3), random_ids(3, seed=4)])[None]
    other = said.clone()
    other[0, 52] = said[0, 52] % 90 + 3
    for used in (cache, cache.fork()):
        with pytest.raises(CacheMisuse, match="at position 52"):
            enabled.generate(other, past_key_values=used, max_new_tokens=1)
    cache.crop(-2)
    enabled.generate(other, past_key_values=cache.fork(), max_new_tokens=1)
    enabled.generate(said, past_key_values=cache, max_new_tokens=1)


def test_the_next_turn_after_beams(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    """The cache holds all the beams, and the best one is not told apart."""
    cache = XKVCache.from_factors(enabled, lossy)
    ids = torch.cat([prefix_ids, random_ids(4)])[None]
    best = enabled.generate(ids, past_key_values=cache, max_new_tokens=6, num_beams=3, eos_token_id=None)
    with pytest.raises(CacheMisuse, match="differ from the cached tokens"):
        enabled.generate(
            torch.cat([best, best[:, -3:]], 1),
            attention_mask=torch.ones(1, best.shape[1] + 3),
            past_key_values=cache,
            max_new_tokens=1,
        )


def test_cropping_into_the_prefix(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = XKVCache.from_factors(enabled, lossy)
    enabled(random_ids(3)[None], past_key_values=cache)
    with pytest.raises(CacheMisuse, match="reaches into the prefix"):
        cache.crop(-4)
    cache.crop(-3)
    assert cache.tail_tokens == 0


def test_another_model_of_the_same_shape(lossy: PrefixFactors) -> None:
    with pytest.raises(ModelMismatch, match="another model"):
        XKVCache.from_factors(tiny_model("llama", seed=1), lossy)


def test_a_model_of_another_shape(lossy: PrefixFactors) -> None:
    with pytest.raises(ModelMismatch, match="another model"):
        XKVCache.from_factors(tiny_model("llama", num_hidden_layers=2), lossy)


def test_a_model_whose_weights_were_changed(model: PreTrainedModel, lossy: PrefixFactors) -> None:
    tuned = copy.deepcopy(model)
    XKVCache.from_factors(tuned, lossy)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(ModelMismatch):
        XKVCache.from_factors(other, lossy)


def test_a_cache_used_with_a_second_model(model: PreTrainedModel, lossy: PrefixFactors) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad(), enable_xkv(model), enable_xkv(other):
        cache = XKVCache.from_factors(model, lossy)
        with pytest.raises(CacheMisuse, match="one model and read by another"):
            other(random_ids(3)[None], past_key_values=cache)


def test_a_cache_used_with_a_second_model_that_is_not_enabled(
    enabled: PreTrainedModel, lossy: PrefixFactors
) -> None:
    """One token needs no mask: nothing but the cache could notice that its prefix is not read."""
    other = tiny_model("llama")
    with pytest.raises(CacheMisuse, match="one model and read by another"):
        other(random_ids(1)[None], past_key_values=XKVCache.from_factors(enabled, lossy))


def test_an_attention_implementation_that_is_changed_inside(
    enabled: PreTrainedModel, lossy: PrefixFactors
) -> None:
    ours = enabled.config._attn_implementation
    enabled.set_attn_implementation("sdpa")
    try:
        with pytest.raises(CacheMisuse, match="did not read the prefix"):
            enabled(random_ids(1)[None], past_key_values=XKVCache.from_factors(enabled, lossy))
    finally:
        enabled.set_attn_implementation(ours)


def test_an_implementation_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UnsupportedModel, match="flash_attention_2"), enable_xkv(model):
        pass


def test_an_update_outside_of_a_call(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    states = torch.zeros(1, 2, 1, 16)
    with pytest.raises(CacheMisuse, match="filled by"):
        XKVCache.from_factors(enabled, lossy).update(states, states, 0)


def test_weights_changed_after_the_first_cache(model: PreTrainedModel, lossy: PrefixFactors) -> None:
    tuned = copy.deepcopy(model)
    XKVCache.from_factors(tuned, lossy)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(ModelMismatch):
        XKVCache.from_factors(tuned, lossy)


@pytest.mark.parametrize("tokens", [0, -1, 49, 2.5, True])
def test_a_prefix_of_impossible_length(model: PreTrainedModel, lossy: PrefixFactors, tokens: int) -> None:
    with pytest.raises(InvalidSpec, match="tokens="):
        XKVCache.from_factors(model, lossy, tokens=tokens)


def test_a_selector_without_its_index(model: PreTrainedModel, lossy: PrefixFactors) -> None:
    with pytest.raises(InvalidSpec, match="without that index"):
        XKVCache.from_factors(model, lossy, SelectionSpec("landmark"))


def test_assisted_generation(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    ids, cache = torch.cat([prefix_ids, random_ids(4)])[None], XKVCache.from_factors(enabled, lossy)
    with pytest.raises(CacheMisuse, match="assisted generation"):
        enabled.generate(ids, past_key_values=cache, max_new_tokens=2, prompt_lookup_num_tokens=3)
    with pytest.raises(CacheMisuse, match="assisted generation"):
        enabled.generate(ids, past_key_values=cache, max_new_tokens=2, assistant_model=enabled)


def test_assistance_that_the_model_asks_for_itself(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, cache = torch.cat([prefix_ids, random_ids(4)])[None], XKVCache.from_factors(enabled, lossy)
    monkeypatch.setattr(enabled.generation_config, "prompt_lookup_num_tokens", 3)
    with pytest.raises(CacheMisuse, match="assisted generation"):
        enabled.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(CacheMisuse, match="assisted generation"):
        enabled.generate(ids, GenerationConfig(max_new_tokens=2), past_key_values=cache)


def test_a_model_that_drops_its_cache(lossy: PrefixFactors) -> None:
    """Transformers does when it trains with gradient checkpointing."""
    model = tiny_model("llama")
    with torch.no_grad(), enable_xkv(model):
        cache = XKVCache.from_factors(model, lossy)
        model.train()
        model.model.layers[0].gradient_checkpointing = True
        with pytest.raises(CacheMisuse, match="gradient checkpointing"):
            model(random_ids(1)[None], past_key_values=cache)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_cropping_windows_and_states(family: str) -> None:
    """Not even a part of the layers goes back."""
    model, ids = tiny_model(family), random_ids(20)
    spec = CompressionSpec(rank_k=8, rank_v=8)
    with torch.no_grad(), enable_xkv(model):
        cache = XKVCache.from_factors(model, compress(model, ids, spec))
        model(random_ids(6)[None], past_key_values=cache)
        with pytest.raises(CacheMisuse, match="cannot go back"):
            cache.crop(-6)
    assert cache.tail_tokens == 6


def test_a_longrope_prefix_that_crosses_its_window() -> None:
    model, ids = tiny_model("phi3-longrope"), random_ids(120)
    with torch.no_grad(), enable_xkv(model):
        cache = XKVCache.from_factors(model, compress(model, ids, CompressionSpec(rank_k=8, rank_v=8)))
        model(random_ids(8)[None], past_key_values=cache)
        with pytest.raises(UnsupportedModel, match="128 tokens"):
            model(random_ids(1)[None], past_key_values=cache)


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 0},
        {"budget": 0.0},
        {"budget": 1.5},
        {"budget": True},
        {"selector": "best"},
        {"granularity": "token"},
        {"sink": -1},
        {"recent": 1.5},
        {"recent": True},
    ],
)
def test_selections_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidSpec, match=next(iter(fields))):
        SelectionSpec(**fields)  # type: ignore[arg-type]


def _hooks(model: PreTrainedModel) -> int:
    return sum(len(one._forward_pre_hooks) + len(one._forward_hooks) for one in model.modules())


def test_the_model_is_left_as_it_was(model: PreTrainedModel, prefix_ids: torch.Tensor) -> None:
    before = model.config._attn_implementation
    hooks = _hooks(model)
    with torch.no_grad():
        expected = model(prefix_ids[None], past_key_values=DynamicCache(config=model.config)).logits
        with enable_xkv(model), enable_xkv(model):
            inside = model(prefix_ids[None], past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(inside, expected)
    assert model.config._attn_implementation == before
    assert _hooks(model) == hooks
    assert "generate" not in vars(model)


def test_blocks_that_end_in_any_order_leave_the_model_as_it_was(model: PreTrainedModel) -> None:
    before, hooks = model.config._attn_implementation, _hooks(model)
    first, second = enable_xkv(model), enable_xkv(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation != before
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == before
    assert _hooks(model) == hooks and "generate" not in vars(model)


class _Interrupted(XKVCache):
    """Ctrl-C falls between a layer's update and its attention."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(*args, **kwargs)
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_nothing_for_the_next(
    enabled: PreTrainedModel, lossy: PrefixFactors
) -> None:
    ids = random_ids(5)[None]
    expected = enabled(ids, past_key_values=DynamicCache(config=enabled.config)).logits
    with pytest.raises(KeyboardInterrupt):
        enabled(ids, past_key_values=_Interrupted.from_factors(enabled, lossy))
    found = enabled(ids, past_key_values=DynamicCache(config=enabled.config)).logits
    assert torch.equal(found, expected)
