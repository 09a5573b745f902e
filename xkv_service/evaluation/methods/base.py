"""The interface of every way to hold the cache of a prefix."""

from __future__ import annotations

from typing import Protocol

from transformers import Cache, PreTrainedModel

from xkv_service.prefilling.prefilled import Prefill


class PreparedPrefix(Protocol):
    """The cache of one prefix, held by one method.

    Attributes:
        tokens: T, tokens of the prefix.
        nbytes: bytes that the method really stores for the prefix, everything counted, numbers that are not
            quantized at 16 bits.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def cache(self) -> Cache:
        """A new Transformers cache that holds the prefix, batch of one; caches do not disturb each other."""


class Method(Protocol):
    """One way to hold the cache of a prefix.

    Attributes:
        name: what results call it.
    """

    @property
    def name(self) -> str: ...

    def prepare(self, model: PreTrainedModel, exact: Prefill) -> PreparedPrefix:
        """Hold the prefix that `exact` is the exact cache of. Leaves `exact` as it was.

        Args:
            model: the model that made the prefill, in evaluation mode.
            exact: a prefill of batch one.
        """
