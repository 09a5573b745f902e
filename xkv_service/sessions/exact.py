"""The exact cache of a prefix, to answer from without compression."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from xkv_service.decoding.growing_layer import GrowingLayer
from xkv_service.sessions.context import Context


def exact_cache(model: PreTrainedModel, prefix_ids: Sequence[int]) -> DynamicCache:
    """An ordinary cache that holds the prefix, computed now.

    Args:
        model: in evaluation mode. prefix_ids: at least one token.
    """
    context = empty_context(model)
    context.advance(prefix_ids)
    return context.cache


def empty_context(model: PreTrainedModel) -> Context:
    """A context of an exact cache that holds nothing yet."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return Context(model, cache, [])
