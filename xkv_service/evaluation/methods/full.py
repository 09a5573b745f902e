"""The exact cache: what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from xkv_service.prefilling.prefilled import Prefill


@dataclass(frozen=True, eq=False)
class ExactPrefix:
    """The exact cache of a prefix, in the prefill's own memory: it lives as long as the prefill."""

    exact: Prefill

    @property
    def tokens(self) -> int:
        """T, tokens of the prefix."""
        return self.exact.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values at 16 bits a number."""
        return self.exact.layout.bytes_full(self.exact.tokens)

    def cache(self) -> DynamicCache:
        """A cache of its own: the prefix is copied when the first token is added."""
        cache: DynamicCache = self.exact.cache()
        return cache


class Full:
    """Keep the exact keys and values."""

    name = "full"

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel, exact: Prefill) -> ExactPrefix:
        """Nothing to do."""
        return ExactPrefix(exact)
