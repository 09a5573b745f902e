"""Fidelity: what compression changed, measured against the exact cache before the artifact is published.

The last tokens of the prefix are held back: the model runs them once more, over the rebuilt cache of the
tokens before them, and its next-token distributions are compared with those of the exact prefill.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_artifacts.manifest import Fidelity
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.observation import observe
from xkv_service.prefilling.prefill_run import can_fuse_chunks
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.reconstruct import rebuild

HELD_BACK = 64
_CHUNK_CPU = 32768
_CHUNK_CUDA = 262144


def held_back(tokens: int) -> int:
    """Positions held back of a prefix of `tokens`: an eighth, at most 64, at least 1 where there are two."""
    return 0 if tokens < 2 else min(HELD_BACK, max(1, tokens // 8))


def certify(
    model: PreTrainedModel,
    prefill: Prefill,
    factors: PrefixFactors,
    key_error: tuple[float, ...],
    value_error: tuple[float, ...],
) -> Fidelity:
    """Measure the factors against the exact prefill.

    The rebuilt keys and values are written over the prefill's own, layer by layer, so that no second full
    cache exists: the prefill is used up.

    Args:
        prefill: made with `tail=held_back(T)`.
        key_error, value_error: relative reconstruction error of each group, kept in the result.
    """
    tail = prefill.tail
    if not tail or prefill.logits_tail is None:
        return Fidelity(top1_agreement=1.0, kl=0.0, positions=0, key_error=key_error, value_error=value_error)
    before = prefill.tokens - tail
    with torch.inference_mode():
        for layer in factors.layers:
            _replace(prefill, factors, layer)
        ids = prefill.token_ids[before:].to(model.device)[None]
        fused = can_fuse_chunks(model, inspect_loaded(model))
        with observe(model, _Unwatched(), [], fused_chunks=fused):
            logits = model(input_ids=ids, past_key_values=prefill.cache(before), use_cache=True).logits[0]
        agreement, kl = compare_distributions(prefill.logits_tail, logits)
    return Fidelity(
        top1_agreement=agreement, kl=kl, positions=tail, key_error=key_error, value_error=value_error
    )


def compare_distributions(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Share of positions with the same most likely token, and mean KL(exact || other) in nats.

    What is no number is infinitely far from everything.

    Args:
        exact, other: logits [n, vocabulary]; tokens of -inf cannot come.
    """
    log_exact, log_other = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    share = log_exact.exp()
    kl = float(torch.where(share == 0, 0, share * (log_exact - log_other)).sum(-1).mean())
    agreement = (log_exact.argmax(-1) == log_other.argmax(-1)).double().mean()
    return float(agreement), math.inf if math.isnan(kl) else max(0.0, kl)


class _Unwatched:
    """Has the model run the attention kernels of the prefill (the observing ones), and notes nothing."""

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        """Nothing."""

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Nothing."""


def _replace(prefill: Prefill, factors: PrefixFactors, layer: int) -> None:
    """Write the rebuilt layer over the exact one: in one piece on a GPU, which then never waits."""
    chunk = _CHUNK_CPU if prefill.device.type == "cpu" else _CHUNK_CUDA
    for start in range(0, prefill.tokens, chunk):
        keys, values = rebuild(factors, layer, start, min(start + chunk, prefill.tokens))
        prefill.replace(layer, keys, values, start)
