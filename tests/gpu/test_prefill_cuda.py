"""Prefill on a GPU: the fused path for later chunks, and the memory it needs."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xkv_service.engine.prefill_clock import PrefillClock
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.prefilling.prefill import prefill, prefill_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def ids_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (tokens,), generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_later_chunks_compute_what_one_forward_does(model: LlamaForCausalLM) -> None:
    ids = ids_of(3000)
    whole = prefill(model, ids, chunk_tokens=4096, tail=16)
    chunked = prefill(model, ids, chunk_tokens=700, tail=16)
    for layer in range(4):
        assert relative(chunked.keys(layer), whole.keys(layer)) < 2e-2
        assert relative(chunked.values(layer), whole.values(layer)) < 2e-2
        assert relative(chunked.query_energy(layer), whole.query_energy(layer)) < 2e-2
    assert relative(chunked.logits_tail, whole.logits_tail) < 3e-2


def test_a_batch_is_its_documents(model: LlamaForCausalLM) -> None:
    documents = [ids_of(900, 1), ids_of(600, 2)]
    for one, document in zip(prefill_batch(model, documents, chunk_tokens=256), documents, strict=True):
        alone = prefill(model, document, chunk_tokens=256)
        assert relative(one.keys(3), alone.keys(3)) < 2e-2


def test_keys_turn_back_to_what_was_cached(model: LlamaForCausalLM) -> None:
    prefix = prefill(model, ids_of(2000))
    table = prefix.rotary(2)
    assert table.inv_freq is not None
    again = table.rotate(prefix.keys(2), torch.arange(2000, device="cuda")).to(torch.bfloat16)
    assert relative(again, prefix.rotated_keys(2)) < 1e-3


def test_reading_keys_never_waits_for_the_gpu(model: LlamaForCausalLM) -> None:
    prefix = prefill(model, ids_of(1000))
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix.keys(1, 100, 900)
        prefix.replace(1, prefix.keys(1, 0, 100), prefix.values(1, 0, 100).clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_near_the_cache(model: LlamaForCausalLM) -> None:
    """A boolean mask of 2,048 x 65,536 alone would be 134 MB, several times the cache."""
    tokens = 65_536
    ids = ids_of(tokens)
    cache_bytes = inspect_loaded(model).layout.bytes_full(tokens)
    prefill(model, ids, chunk_tokens=2048).free()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prefix = prefill(model, ids, chunk_tokens=2048)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.3 * cache_bytes
    prefix.free()


def test_a_prefill_is_timed_until_the_device_is_done() -> None:
    clock = PrefillClock(torch.device("cuda"))
    torch.cuda.synchronize()  # CUDA has begun
    clock.begin()
    torch.cuda._sleep(200_000_000)  # cycles, at about two a nanosecond
    assert clock.seconds(beside_loads=False) > 0.05
