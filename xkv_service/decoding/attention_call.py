"""What a model's attention is called with, and the layers of a cache that answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from xkv_service.decoding.scoring import Scoring


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention module's attention function.

    Args:
        query: [batch, query_heads, t, D], rotated.
        keys, values: what the cache layer's `update` returned.
        mask: [batch or 1, 1, t, all tokens], bool (True: attend) or added to the scores, or None.
        scoring: what makes scores of products.
        plain: the model's own attention, of query, keys, values and mask: (out [batch, t, heads, Dv], ...).
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scoring: Scoring
    plain: Callable[..., Any]


class AttendingLayer(Protocol):
    """A cache layer that computes attention itself: it holds more than `update` returns.

    Attributes:
        index: layer index in the model.
    """

    index: int

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """[batch, t, query_heads, Dv]."""
