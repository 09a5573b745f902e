"""How many tokens one forward of a prefill takes.

On a GPU the fastest attention kernels take a whole prefix at once: Llama-3.1-8B's shapes at 128k took 11.6 s
in one forward on an H200 and 16.7 s in chunks of 8,192. So chunks are as large as memory allows there.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from xkv_service.modeling.layout import ModelLayout
from xkv_service.modeling.observation import attention_implementation

CPU_TOKENS = 1024
LEAST_CUDA_TOKENS = 256
# Sliding layers are given a mask of chunk x (chunk + window): small chunks cost them less.
MOST_SLIDING_TOKENS = 8192

_SHARE_OF_FREE_MEMORY = 0.6


def chunk_tokens(
    model: PreTrainedModel, layout: ModelLayout, documents: int, longest: int, *, fused: bool
) -> int:
    """Tokens of each document in one forward.

    Args:
        layout: the model's cache.
        documents, longest: documents in the batch and tokens of the longest.
        fused: whether attention needs no mask (`prefill_run.can_fuse_chunks`).
    """
    if model.device.type != "cuda":
        return CPU_TOKENS
    free = _free_bytes(model.device) - documents * longest * (
        cache_bytes(model, layout) + _expanded_bytes(model, layout)
    )
    token = _activation_bytes(model) + _score_bytes(model, layout, longest, fused)
    fits = int(_SHARE_OF_FREE_MEMORY * free) // (documents * token)
    if layout.has_sliding:
        fits = min(fits, MOST_SLIDING_TOKENS)
    return max(LEAST_CUDA_TOKENS, fits)


def _free_bytes(device: torch.device) -> int:
    """Memory nobody holds, and what PyTorch's allocator holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cache_bytes(model: PreTrainedModel, layout: ModelLayout) -> int:
    """Bytes of one token's exact cache as the model computes it."""
    width = sum(layer.key_width + layer.value_width for layer in layout.layers)
    return width * int(model.dtype.itemsize)


def _expanded_bytes(model: PreTrainedModel, layout: ModelLayout) -> int:
    """Bytes of the keys and values one cached token's latent expands to while its layer runs, and of the copy
    that latent attention (MLA) makes of them.
    """
    if all(layer.kind != "latent" for layer in layout.layers):
        return 0
    config = model.config.get_text_config(decoder=True)
    heads = max(layer.query_heads for layer in layout.layers)
    width = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim) + int(config.v_head_dim)
    return 2 * heads * width * int(model.dtype.itemsize)


def _activation_bytes(model: PreTrainedModel) -> int:
    """Bytes one token needs at the widest point of a layer: states, queries, keys and values, and the MLP."""
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return (8 * hidden + 3 * inner * experts) * int(model.dtype.itemsize)


def _score_bytes(model: PreTrainedModel, layout: ModelLayout, longest: int, fused: bool) -> int:
    """Bytes of one token's attention scores or mask against the whole prefix, where they are written out."""
    if attention_implementation(model) == "eager":
        return 12 * longest * max(layer.query_heads for layer in layout.layers)
    return 0 if fused else 4 * longest
