"""Tokens with a meaning to the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the model's and the tokenizer's."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    known = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in (*known, tokenizer.eos_token_id) if end is not None)
