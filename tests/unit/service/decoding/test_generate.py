"""Everything `generate` does with a dense cache it does with a cache of factors, token for token."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import pytest
import torch
from compressed import random_ids
from families import tiny_model
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.factors import PrefixFactors

EVERYTHING = SelectionSpec("exact", 1.0)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def _exact(model: PreTrainedModel, ids: torch.Tensor, rows: int = 1) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids[None].expand(rows, -1), past_key_values=cache)
    return cache


def _both(
    model: PreTrainedModel, factors: PrefixFactors, ids: torch.Tensor, rows: int = 1, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens from the cache of factors and from the exact one, for full ids [rows, n]."""
    prefix = ids[0, : factors.tokens]
    torch.manual_seed(0)
    found = model.generate(ids, past_key_values=XKVCache.from_factors(model, factors, EVERYTHING), **options)
    torch.manual_seed(0)
    expected = model.generate(ids, past_key_values=_exact(model, prefix, rows), **options)
    return found, expected


def _full_ids(prefix: torch.Tensor, new: int, rows: int = 1) -> torch.Tensor:
    return torch.stack([torch.cat([prefix, random_ids(new, seed=7 + row)]) for row in range(rows)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {"prefill_chunk_size": 3},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "sampling", "chunked", "beams", "two-beams", "three-samples"],
)
def test_generates_what_the_exact_cache_gives(
    enabled: PreTrainedModel, lossless: PrefixFactors, prefix_ids: torch.Tensor, options: dict[str, Any]
) -> None:
    rows = options.get("num_beams", 1) if options.get("num_beams", 1) > 1 else 1
    rows = max(rows, options.get("num_return_sequences", 1))
    found, expected = _both(enabled, lossless, _full_ids(prefix_ids, 9), rows, **{**GREEDY, **options})
    assert torch.equal(found, expected)


def test_a_batch_shares_the_prefix(
    enabled: PreTrainedModel, lossless: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    found, expected = _both(enabled, lossless, _full_ids(prefix_ids, 9, rows=3), 3, **GREEDY)
    assert torch.equal(found, expected)


def test_left_padded_suffixes_give_what_each_alone_gives(
    enabled: PreTrainedModel, lossless: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    suffixes = [random_ids(5, seed=1), random_ids(9, seed=2)]
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, len(prefix_ids) + 9, dtype=torch.int64)
    for row, suffix in enumerate(suffixes):
        ids[row, 9 - len(suffix) :] = suffix
        mask[row, len(prefix_ids) : len(prefix_ids) + 9 - len(suffix)] = 0
    cache = XKVCache.from_factors(enabled, lossless, EVERYTHING)
    together = enabled.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)[:, 9:]
    for row, suffix in enumerate(suffixes):
        alone = _both(enabled, lossless, torch.cat([prefix_ids, suffix])[None], **GREEDY)[1]
        assert torch.equal(together[row], alone[0, len(prefix_ids) + len(suffix) :])


def test_streams_token_by_token(
    enabled: PreTrainedModel, lossless: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            pass

    collector, ids = Collector(), _full_ids(prefix_ids, 4)
    cache = XKVCache.from_factors(enabled, lossless, EVERYTHING)
    out = enabled.generate(ids, past_key_values=cache, streamer=collector, **GREEDY)
    assert torch.equal(torch.cat(collector.pieces), out[0])
    assert len(collector.pieces) == 1 + GREEDY["max_new_tokens"]


def test_turns_on_one_cache_give_what_one_prompt_gives(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    """With selection: each token chooses for itself, so it does not matter in which call it came."""
    selection = SelectionSpec(budget=6, recent=0)
    cache = XKVCache.from_factors(enabled, lossy, selection)
    ids = prefix_ids[None]
    for turn in range(3):
        ids = torch.cat([ids, random_ids(4, seed=20 + turn)[None]], 1)
        # Transformers takes a generated pad id for padding when no mask is given.
        mask = torch.ones_like(ids)
        ids = enabled.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        fresh = XKVCache.from_factors(enabled, lossy, selection)
        again = enabled(ids[:, len(prefix_ids) : -1], past_key_values=fresh).logits
        assert torch.equal(
            again[0, -GREEDY["max_new_tokens"] :].argmax(-1), ids[0, -GREEDY["max_new_tokens"] :]
        )


def test_cropping_the_tail_takes_it_back(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    cache = XKVCache.from_factors(enabled, lossy, SelectionSpec(budget=6, recent=0))
    first, second = random_ids(7, seed=3)[None], random_ids(7, seed=4)[None]
    expected = enabled(second, past_key_values=cache.fork()).logits
    enabled(first, past_key_values=cache)
    cache.crop(-7)
    torch.testing.assert_close(enabled(second, past_key_values=cache).logits, expected)


def test_a_deep_copy_is_a_fork(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    """Transformers' guides copy a cache deeply to use its prefix again."""
    cache, ids = XKVCache.from_factors(enabled, lossy), random_ids(5, seed=5)[None]
    copied = copy.deepcopy(cache)
    assert copied.prefix is cache.prefix
    expected = enabled(ids, past_key_values=cache).logits
    assert copied.tail_tokens == 0
    torch.testing.assert_close(enabled(ids, past_key_values=copied).logits, expected)


def test_a_model_that_was_cast_gets_a_prefix_of_its_own() -> None:
    model, ids = tiny_model("gemma2"), random_ids(20)
    with torch.no_grad(), enable_xkv(model):
        factors = compress(model, ids, CompressionSpec(rank_k=8, rank_v=8))
        before = XKVCache.from_factors(model, factors).prefix
        model.to(torch.bfloat16)
        cache = XKVCache.from_factors(model, factors)
        assert cache.prefix is not before
        assert model(random_ids(3)[None], past_key_values=cache).logits.dtype == torch.bfloat16


def test_forks_go_their_own_ways_and_share_the_prefix(enabled: PreTrainedModel, lossy: PrefixFactors) -> None:
    cache = XKVCache.from_factors(enabled, lossy)
    enabled(random_ids(5, seed=5)[None], past_key_values=cache)
    fork, token = cache.fork(), random_ids(1, seed=6)[None]
    before = enabled(token, past_key_values=cache.fork()).logits
    enabled(random_ids(3, seed=8)[None], past_key_values=fork)
    torch.testing.assert_close(enabled(token, past_key_values=cache).logits, before)
    assert fork.prefix is cache.prefix
    assert (cache.tail_tokens, fork.tail_tokens) == (6, 8)
    assert cache.tail_bytes == 6 * 3 * 2 * 2 * 16 * 4


def test_two_threads_on_one_model_do_not_disturb_each_other(
    enabled: PreTrainedModel, lossy: PrefixFactors, prefix_ids: torch.Tensor
) -> None:
    suffixes = [random_ids(6, seed=30 + i)[None] for i in range(2)]
    alone = [enabled(s, past_key_values=XKVCache.from_factors(enabled, lossy)).logits for s in suffixes]
    found: list[list[torch.Tensor]] = [[], []]

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                cache = XKVCache.from_factors(enabled, lossy)
                found[number].append(enabled(suffixes[number], past_key_values=cache).logits)

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 20
        for logits in found[number]:
            torch.testing.assert_close(logits, alone[number])


@pytest.mark.parametrize(
    "family",
    ["gemma2", "gemma3", "gpt_oss", "cohere2", "deepseek_v3", "qwen3_next", "lfm2", "granitemoehybrid"],
)
def test_hybrids_generate_in_batches_and_beams(family: str) -> None:
    model, ids = tiny_model(family), random_ids(40)
    spec = CompressionSpec(
        group_size=2, rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32"
    )
    with torch.no_grad(), enable_xkv(model):
        factors = compress(model, ids, spec)
        found, expected = _both(model, factors, _full_ids(ids, 12, rows=2), 2, **GREEDY)
        assert torch.equal(found, expected)
        found, expected = _both(model, factors, _full_ids(ids, 12), 2, **GREEDY, num_beams=2)
        assert torch.equal(found, expected)


def test_one_thread_compresses_while_another_decodes(model: PreTrainedModel, lossy: PrefixFactors) -> None:
    """Both change the model's attention, and each puts it back."""

    def decode() -> None:
        for _ in range(15):
            with torch.no_grad(), enable_xkv(model):
                model(random_ids(4)[None], past_key_values=XKVCache.from_factors(model, lossy))

    before = model.config._attn_implementation
    with ThreadPoolExecutor() as threads:
        decoding = threads.submit(decode)
        for seed in range(5):
            compress(model, random_ids(30, seed=seed), CompressionSpec(rank_k=4, rank_v=4))
        decoding.result()
    assert model.config._attn_implementation == before
