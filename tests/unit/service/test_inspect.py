"""What a model caches, and which models are refused for which reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, HYBRID, LATENT, build, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.inspect import inspect_model
from xkv_service.modeling.layout import LayerKind, LayerLayout, ModelLayout

LATENT_FIELDS: dict[str, Any] = LATENT["deepseek_v3"][1]
MAMBA_FIELDS: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
}
JAMBA_FIELDS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
SHARED_FIELDS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def test_layout_of_grouped_query_attention() -> None:
    layout = inspect_model(tiny_model("llama"))
    assert layout.layers == tuple(
        LayerLayout(index, "full", kv_heads=2, query_heads=4, head_dim=16, value_dim=16) for index in range(3)
    )
    assert layout.bytes_full(100) == 100 * 3 * 2 * (16 + 16) * 2
    assert [len(group) for group in layout.groups(2)] == [2, 1]


def test_sliding_layers_are_kept_apart_with_their_window() -> None:
    model = tiny_model("gemma3")
    layout = inspect_model(model)
    assert [layer.kind for layer in layout.layers] == ["sliding", "full", "full"]
    assert [layer.index for layer in layout.compressible] == [1, 2]
    with torch.inference_mode():
        cache = model(torch.arange(3, 33)[None], use_cache=True).past_key_values
    assert layout.layers[0].window == cache.layers[0].keys.shape[2]


@pytest.mark.parametrize("family", LATENT)
def test_latents_are_counted_and_not_what_they_expand_to(family: str) -> None:
    layout = inspect_model(tiny_model(family))
    assert {layer.kind for layer in layout.layers} == {"latent"}
    assert {(layer.kv_heads, layer.head_dim, layer.value_dim) for layer in layout.layers} == {(1, 32, 8)}
    assert layout.bytes_full(100) == len(layout.layers) * 100 * (32 + 8) * 2


@pytest.mark.parametrize("family", HYBRID)
def test_states_of_linear_layers_are_counted_as_they_are(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    layout = inspect_model(model)
    with torch.inference_mode():
        cache = model(torch.arange(3, 33)[None], use_cache=True).past_key_values
    states = [
        state
        for layer in layout.layers
        if layer.kind == "linear"
        for held in (cache.layers[layer.index].conv_states, cache.layers[layer.index].recurrent_states)
        for state in held.values()
        if state is not None
    ]
    assert states
    growing = layout.bytes_full(31) - layout.bytes_full(30)
    assert layout.bytes_full(30) == 30 * growing + sum(state.nbytes for state in states)


def test_groups_never_mix_full_and_latent_attention() -> None:
    layer = LayerLayout(0, "full", kv_heads=2, query_heads=4, head_dim=16, value_dim=16)
    kinds: list[LayerKind] = ["full", "latent", "latent", "linear", "latent", "full"]
    layout = ModelLayout(tuple(replace(layer, index=i, kind=kind) for i, kind in enumerate(kinds)))
    assert [[one.index for one in group] for group in layout.groups(2)] == [[0], [1, 2], [4], [5]]


def test_a_number_counts_two_bytes_whatever_the_model_computes_in() -> None:
    sizes = {
        inspect_model(tiny_model("llama", dtype=dtype)).bytes_full(10)
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_same_layout(family: str) -> None:
    model = tiny_model(family)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert inspect_model(empty) == inspect_model(model)


@pytest.mark.parametrize(
    ("model_type", "fields", "kv_heads", "head_dim"),
    [("gpt_bigcode", {}, 1, 16), ("gemma4_text", {}, 2, 512), ("gpt2", {}, 4, 16), ("opt", {}, 4, 16)],
)
def test_shapes_that_config_fields_do_not_tell(
    model_type: str, fields: dict[str, Any], kv_heads: int, head_dim: int
) -> None:
    layer = inspect_model(build(model_type, **fields)).compressible[-1]
    assert (layer.kv_heads, layer.head_dim) == (kv_heads, head_dim)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("mistral", {"sliding_window": 16}, "no full-attention layer"),
        ("hunyuan_v1_dense", {}, "rotary embedding of layer 0 cannot be inverted"),
        ("mamba", {}, "no full-attention layer"),
        ("recurrent_gemma", {}, "no full-attention layer"),
        (
            "deepseek_v32",
            LATENT_FIELDS,
            "layer 0 keeps a DynamicIndexedLayer, which selects tokens with an indexer",
        ),
        ("glm_moe_dsa", LATENT_FIELDS, "indexer of its own"),
        ("falcon_h1", MAMBA_FIELDS, "layer 0 keeps a .*, which mixes linear and full attention"),
        ("jamba", JAMBA_FIELDS, "does not go on from a cached prefix"),
        ("bamba", {**MAMBA_FIELDS, "attn_layer_indices": [1]}, "does not go on from a cached prefix"),
        ("minimax", {"num_local_experts": 2}, "does not run with Transformers' ordinary cache: MiniMax"),
        ("gemma3n_text", SHARED_FIELDS, "shares keys and values between layers"),
        ("bloom", {}, "does not use Transformers' attention interface"),
        ("gptj", {}, "does not use Transformers' attention interface"),
        ("bert", {}, "attends to later tokens"),
    ],
)
def test_refused_models_say_why(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as refused:
        inspect_model(build(model_type, **fields))
    assert "\n" not in refused.value.message
    assert refused.value.hint


def test_encoder_decoder_models_are_refused() -> None:
    config = AutoConfig.for_model(
        "bart",
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        vocab_size=96,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        inspect_model(AutoModelForSeq2SeqLM.from_config(config))


def test_a_model_is_inspected_once() -> None:
    model = tiny_model("llama")
    assert inspect_model(model) is inspect_model(model)
