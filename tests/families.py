"""Tiny random models of many families, with weights sharp enough that faults show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LONG = [1.0 + 0.5 * i for i in range(8)]
_SHORT = [1.0 + 0.1 * i for i in range(8)]


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)
_LONGROPE = _rope(
    "longrope",
    short_factor=_SHORT,
    long_factor=_LONG,
    original_max_position_embeddings=128,
    factor=4.0,
)
_HYBRID = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
_DELTA_NET = {
    **_LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, "linear_conv_kernel_dim": 4}
_CONVOLUTION = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 32, "mamba_n_groups": 1}

_Families = dict[str, tuple[str, dict[str, Any]]]

# Multi-head latent attention: one latent and one rotated key are cached for all heads.
LATENT: _Families = {
    "deepseek_v2": ("deepseek_v2", {**_LATENT, **_ROUTED, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, **_ROUTED}),
    "deepseek_v3-yarn": ("deepseek_v3", {**_LATENT, **_ROUTED, **_YARN, "q_lora_rank": None}),
    "minicpm3": ("minicpm3", {**_LATENT, "dim_model_base": 64}),
    "glm4_moe_lite": ("glm4_moe_lite", {**_LATENT, **_ROUTED}),
    "longcat_flash": (
        "longcat_flash",
        {
            **_LATENT,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
    ),
    "youtu": ("youtu", _LATENT),
}

# Some layers keep a state instead of keys and values; kimi_linear's others have latents.
HYBRID: _Families = {
    "qwen3_next": ("qwen3_next", {**_DELTA_NET, **_SHARED_EXPERT, "decoder_sparse_step": 1}),
    "qwen3_5": ("qwen3_5_text", _DELTA_NET),
    "olmo_hybrid": ("olmo_hybrid", _DELTA_NET),
    "lfm2": ("lfm2", {**_CONVOLUTION, "block_auto_adjust_ff_dim": False}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MAMBA,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 8,
        },
    ),
    "kimi_linear": ("kimi_linear", {**_LATENT, **_ROUTED, **_LINEAR, **_KIMI}),
    "bailing_hybrid": ("bailing_hybrid", {**_LATENT, **_ROUTED, **_LINEAR}),
}

FAMILIES: _Families = {
    "llama": ("llama", {}),
    "llama-llama3": ("llama", _LLAMA3),
    "llama-yarn": ("llama", _YARN),
    "llama-linear": ("llama", _rope("linear", factor=2.0)),
    "llama-dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama-biased": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {**_EXPERTS, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _HYBRID),
    "gemma3": ("gemma3_text", _HYBRID),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", {**_LONGROPE, "original_max_position_embeddings": 128}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, "num_key_value_heads": 4}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, **_HYBRID}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", _HYBRID),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "granite": ("granite", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "exaone4": ("exaone4", {**_HYBRID}),
    "ernie4_5": ("ernie4_5", {}),
    **LATENT,
    **HYBRID,
}

_SHARPENED = ("q_proj", "k_proj", "qkv", "query_key_value", "q_b_proj", "kv_b_proj")
_SHARPENED += ("in_proj", "conv1d.weight", "conv.conv.weight")


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A tiny model of a family in `FAMILIES`, evaluation mode, weights sharpened.

    Plain random weights hide real faults: attention is nearly uniform and norms are all ones.
    """
    model_type, fields = FAMILIES[family]
    return build(model_type, seed=seed, dtype=dtype, **{**fields, **changes})


def build(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> PreTrainedModel:
    """A tiny model of any Transformers model type, sharpened as `tiny_model`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_BASE, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "kv_a_proj" in name:
                parameter[-config.qk_rope_head_dim :].mul_(6.0)
            elif name.endswith("A_log"):
                parameter.sub_(3.0)  # states that last
            elif any(part in name for part in _SHARPENED):
                parameter.mul_(6.0)
    return model.eval()
