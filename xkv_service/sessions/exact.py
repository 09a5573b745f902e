"""The exact cache of a prefix, to answer from without compression."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache, PreTrainedModel

from xkv_service.sessions.context import Context


def exact_cache(model: PreTrainedModel, prefix_ids: Sequence[int]) -> DynamicCache:
    """An ordinary cache that holds the prefix, computed now.

    Args:
        model: in evaluation mode. prefix_ids: at least one token.
    """
    cache = DynamicCache(config=model.config)
    Context(model, cache, []).advance(prefix_ids)
    return cache
