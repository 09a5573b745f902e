"""What a model caches, and which models are refused for which reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.inspect import inspect_model
from xkv_service.modeling.layout import LayerLayout


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
        ("qwen3_next", {}, "LinearAttention"),
        ("mamba", {}, "LinearAttentionLayer"),
        ("deepseek_v3", {}, "multi-head latent attention"),
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
