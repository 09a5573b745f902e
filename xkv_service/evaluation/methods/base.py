"""The interface of every way to hold the cache of a prefix."""

from __future__ import annotations

from typing import Protocol

from transformers import Cache, PreTrainedModel

from xkv_service.prefilling.prefilled import Prefill


class PreparedPrefix(Protocol):
    """The cache of one prefix, held by one method."""

    @property
    def tokens(self) -> int:
        """T, tokens of the prefix."""

    @property
    def nbytes(self) -> int:
        """Bytes that the method really stores for the prefix, everything counted.

        Numbers that are not quantized count 16 bits.
        """

    def cache(self) -> Cache:
        """A new Transformers cache that holds the prefix, batch of one; caches do not disturb each other."""


class Method(Protocol):
    """One way to hold the cache of a prefix."""

    @property
    def name(self) -> str:
        """What results call it."""

    def prepare(self, model: PreTrainedModel, exact: Prefill) -> PreparedPrefix:
        """Hold the prefix that `exact` is the exact cache of. Leaves `exact` as it was.

        Args:
            model: the model that made the prefill, in evaluation mode.
            exact: a prefill of batch one.
        """
