"""Compressing whole prefixes: dense rebuild against the exact cache."""

from __future__ import annotations

import pytest
import torch
from compressed import random_ids
from families import HYBRID, LATENT, tiny_model

import xkv_service
from xkv_service.compression import compress, compress_prefill, factorize_prefill
from xkv_service.errors import InvalidPrompt, RatioUnreachable
from xkv_service.factors import PrefixFactors
from xkv_service.fidelity import held_back
from xkv_service.prefilling.prefill import prefill
from xkv_service.reconstruct import dense_cache, rebuild
from xkv_service.spec import CompressionSpec

FULL = CompressionSpec(
    group_size=2, rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32", index="none", sink=0
)
IDS = random_ids(150)


def next_logits(model: torch.nn.Module, factors: PrefixFactors, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids[None], past_key_values=dense_cache(model, factors)).logits[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "family",
    [
        *["llama", "llama-yarn", "phi", "smollm3", "gemma2", "gpt_neox", "qwen3", "phi3-longrope"],
        *[*LATENT, *HYBRID],
    ],
)
@pytest.mark.parametrize("weights", ["none", "query"])
def test_full_rank_gives_the_exact_logits(family: str, weights: str) -> None:
    model = tiny_model(family)
    ids = random_ids(110)
    spec = CompressionSpec(**{**FULL.canonical(), "key_weights": weights})
    factors = compress(model, ids[:100], spec)
    with torch.inference_mode():
        exact = model(input_ids=ids[None]).logits[0, 100:]
    tolerance = 1e-5 * float(exact.abs().max())
    torch.testing.assert_close(next_logits(model, factors, ids[100:]), exact, atol=tolerance, rtol=0)
    assert factors.fidelity is not None
    assert factors.fidelity.top1_agreement == 1.0
    assert factors.fidelity.kl < 1e-8


def test_generate_goes_on_from_the_rebuilt_cache() -> None:
    model = tiny_model("llama")
    factors = compress(model, IDS[:140], FULL)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS[None], **options)
    assert torch.equal(
        model.generate(IDS[None], past_key_values=dense_cache(model, factors), **options), expected
    )


def test_fewer_ranks_lose_more() -> None:
    model = tiny_model("llama")
    errors = []
    for rank in (4, 16, 48):
        fidelity = compress(model, IDS, CompressionSpec(rank_k=rank, rank_v=rank, group_size=2)).fidelity
        assert fidelity is not None
        errors.append((fidelity.kl, sum(fidelity.key_error), sum(fidelity.value_error)))
    assert errors[0] > errors[1] > errors[2]


def test_ids_as_list_row_or_vector_give_the_same_factors() -> None:
    model, spec = tiny_model("llama"), CompressionSpec(ratio=1.2, group_size=2)
    made = [compress(model, ids, spec).to_tensors() for ids in (IDS, IDS[None], IDS.tolist())]
    for other in made[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("index", ["sketch", "landmark", "none"])
def test_exact_tokens_are_put_back(index: str) -> None:
    model = tiny_model("llama")
    spec = CompressionSpec(
        rank_k=2,
        rank_v=2,
        index=index,
        sink=3,
        recent=5,
        outlier_chunks=2,
        landmark_chunk=4,
        dtype="float32",
        factor_dtype="float32",
    )  # type: ignore[arg-type]
    exact = prefill(model, IDS)
    factors, _ = factorize_prefill(model, exact, spec)
    positions = factors.exact[1].positions.long()
    assert len(positions) == 3 + 5 + 8
    keys, values = rebuild(factors, 1)
    torch.testing.assert_close(keys[positions], exact.keys(1)[positions])
    assert torch.equal(values[positions], exact.values(1)[positions])
    others = torch.ones(len(IDS), dtype=torch.bool)
    others[positions] = False
    assert (keys[others] - exact.keys(1)[others]).abs().max() > 0.01
    part, _ = rebuild(factors, 1, 2, 149)
    torch.testing.assert_close(part, keys[2:149])


def test_a_prefix_of_the_factors_is_the_shorter_prefix() -> None:
    model = tiny_model("llama")
    factors = compress(model, IDS, FULL)
    cache = dense_cache(model, factors, 90)
    assert cache.get_seq_length() == 90
    with torch.inference_mode():
        exact = model(input_ids=IDS[None, :100]).logits[0, 90:]
        rebuilt = model(input_ids=IDS[None, 90:100], past_key_values=cache).logits[0]
    torch.testing.assert_close(rebuilt, exact, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="tokens=151"):
        dense_cache(model, factors, 151)


@pytest.mark.parametrize(
    ("family", "layers"), [("gemma2", "sliding-window"), ("qwen3_next", "linear-attention")]
)
def test_a_prefix_whose_layers_keep_only_its_end_is_rebuilt_whole(family: str, layers: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ValueError, match=f"tokens=90: a prefix with {layers} layers is rebuilt whole"):
        dense_cache(model, compress(model, IDS, FULL), 90)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_a_rebuilt_cache_has_states_of_its_own(family: str) -> None:
    """Models change their states in place: a second cache must not start where the first one ended."""
    model = tiny_model(family)
    factors = compress(model, IDS, FULL)
    first = next_logits(model, factors, IDS[:4])
    assert torch.equal(next_logits(model, factors, IDS[:4]), first)


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_latents_have_no_values_and_no_index_and_their_rotated_keys_stay_exact(family: str) -> None:
    model = tiny_model(family)
    exact = prefill(model, IDS)
    spec = CompressionSpec(rank_k=6, rank_v=1000, index="sketch", sink=3, dtype="float32")
    factors, errors = factorize_prefill(model, exact, spec)
    assert [(group.layout.rank_k, group.layout.rank_v) for group in factors.groups] == [(6, 0)]
    assert factors.groups[0].values is None
    assert not factors.sketches and not factors.landmarks
    assert errors.value_error == (0.0,)
    for layer in factors.layers:
        keys, rope_keys = rebuild(factors, layer)
        assert torch.equal(rope_keys, exact.values(layer))
        assert torch.equal(keys[:3], exact.keys(layer)[:3])
        assert (keys[3:] - exact.keys(layer)[3:]).abs().max() > 0.01


def test_one_prefill_serves_many_specs() -> None:
    model = tiny_model("llama")
    exact = prefill(model, IDS, tail=held_back(len(IDS)))
    specs = [CompressionSpec(rank_k=k, rank_v=9, group_size=2) for k in (5, 7)]
    shared = [factorize_prefill(model, exact, spec)[0].to_tensors() for spec in specs]
    alone = [compress(model, IDS, spec).to_tensors() for spec in specs]
    for one, other in zip(shared, alone, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_very_short_prefixes_are_compressed(tokens: int) -> None:
    model = tiny_model("llama")
    factors = compress(
        model,
        IDS[:tokens],
        CompressionSpec(rank_k="full", rank_v="full", dtype="float32", factor_dtype="float32"),
    )
    assert factors.fidelity is not None
    assert factors.fidelity.positions == held_back(tokens)
    with torch.inference_mode():
        exact = model(input_ids=IDS[None, : tokens + 5]).logits[0, tokens:]
    logits = next_logits(model, factors, IDS[tokens : tokens + 5])
    torch.testing.assert_close(logits, exact, atol=1e-4, rtol=1e-4)


def test_bad_input_is_refused() -> None:
    model = tiny_model("llama")
    for ids in ([], IDS.reshape(2, 75), IDS.float(), "text"):
        with pytest.raises(InvalidPrompt):
            compress(model, ids)  # type: ignore[arg-type]
    with pytest.raises(RatioUnreachable):
        compress(model, IDS, CompressionSpec(ratio=200))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        before = model(input_ids=IDS[None]).logits
    implementation = model.config._attn_implementation
    compress(model, IDS, CompressionSpec(ratio=1.2))
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS[None]).logits, before)


def test_a_bf16_model_is_compressed() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    exact = prefill(model, IDS, tail=held_back(len(IDS)))
    factors = compress_prefill(model, exact, CompressionSpec(rank_k="full", rank_v="full", group_size=2))
    assert factors.fidelity is not None
    assert factors.fidelity.kl < 0.01


def test_the_public_names_are_importable() -> None:
    assert xkv_service.compress is compress
    assert xkv_service.CompressionSpec is CompressionSpec
    assert xkv_service.PrefixFactors is PrefixFactors
