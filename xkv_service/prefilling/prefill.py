"""Exact prefill of prefixes in chunks, with what compression needs observed on the way.

prefix = prefill(model, token_ids, tail=64)
prefix.keys(layer, 0, 512)      # before RoPE
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from xkv_service.modeling.inspect import InspectedModel, inspect_loaded
from xkv_service.modeling.rotary_source import frequency_change
from xkv_service.prefilling.prefill_run import Document, Run, TokenIds
from xkv_service.prefilling.prefilled import Prefill

__all__ = ["Prefill", "TokenIds", "prefill", "prefill_batch"]


def prefill(
    model: PreTrainedModel, input_ids: TokenIds, *, chunk_tokens: int | None = None, tail: int = 0
) -> Prefill:
    """Run the model over one prefix and keep its exact cache.

    Args:
        model: a supported model; its attention implementation and hooks are as before when this returns.
        input_ids: token ids, list or integer tensor [T] or [1, T].
        chunk_tokens: most tokens in one forward; by default by device and free memory (`chunking.py`).
        tail: last positions whose next-token logits are kept, and the position `cache(tokens=T - tail)`
            can be taken at in a model with sliding-window or linear-attention layers.

    Raises:
        UnsupportedModel: the model's cache cannot be compressed.
        InvalidPrompt: no tokens, ids that are not the model's or too many, or a `tail` as long as the prefix.
    """
    return prefill_batch(model, [input_ids], chunk_tokens=chunk_tokens, tail=tail)[0]


def prefill_batch(
    model: PreTrainedModel,
    documents: Sequence[TokenIds],
    *,
    chunk_tokens: int | None = None,
    tail: int | Sequence[int] = 0,
) -> list[Prefill]:
    """Run the model over several prefixes of similar length at once, padded on the right.

    Attention is causal, so no real token sees a pad. The prefixes share storage: free them together. A model
    with sliding-window or linear-attention layers runs them one by one, since pads would push tokens out of
    the window and enter the state.

    Args:
        documents: token ids, each as in `prefill`.
        chunk_tokens, tail: as in `prefill`; one tail for all, or one per document.

    Raises:
        UnsupportedModel, InvalidPrompt: as `prefill`.
    """
    inspected = inspect_loaded(model)
    tails = [tail] * len(documents) if isinstance(tail, int) else tail
    batch = [Document.of(ids, one, model.config) for ids, one in zip(documents, tails, strict=True)]
    results: list[Prefill] = []
    with torch.inference_mode():
        for padded_together in _batches(model, inspected, batch):
            results += Run(model, inspected, padded_together, chunk_tokens).prefills()
    return results


def _batches(
    model: PreTrainedModel, inspected: InspectedModel, documents: list[Document]
) -> list[list[Document]]:
    """The documents in order, cut into runs that may be padded together."""
    change = frequency_change(model.config)
    longest = max((document.length for document in documents), default=0)
    if inspected.layout.exact or (change is not None and longest > change[1]):
        return [[document] for document in documents]
    return [documents] if documents else []
