"""`Context`: a Transformers cache, the tokens it holds, and the way back to fewer of them."""

from __future__ import annotations

import copy
import inspect
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.fold import refuse_unfoldable
from xkv_service.decoding.tail_bytes import tail_bytes
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.errors import CacheMisuse
from xkv_service.modeling.linear_state import copy_state_layer

CHUNK_TOKENS = 2048
"""Most tokens of one forward."""


class Context:
    """One sequence of tokens in a cache that starts with a prefix. It never forgets the prefix.

    A forward that an exception cuts short leaves some layers longer than others: the next call mends that.

    Args:
        model: in evaluation mode; the cache is on its device.
        cache: an `XKVCache`, or an ordinary `DynamicCache`, with the prefix and nothing else in it.
        prefix_ids: the tokens in the cache.

    Attributes:
        ids: the tokens the cache holds, int32.

    Raises:
        CacheMisuse: the cache holds another number of tokens.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, prefix_ids: Sequence[int]) -> None:
        self.model, self.cache = model, cache
        self.ids: array[int] = array("i", prefix_ids)
        self.prefix_tokens = len(self.ids)
        held = int(cache.get_seq_length())
        if held != self.prefix_tokens:
            raise CacheMisuse(
                f"the cache holds {held} tokens, and the prefix has {self.prefix_tokens}",
                hint="give a cache with the prefix and nothing else in it",
            )
        self.can_crop = all(_can_crop(layer) for layer in cache.layers)
        self._origin = _fork(cache)
        self._takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._torn = False

    @property
    def prefix_ids(self) -> list[int]:
        """The tokens of the prefix."""
        return self.ids[: self.prefix_tokens].tolist()

    @property
    def fixed_tokens(self) -> int:
        """Tokens that stay: the prefix's, and those that were folded behind it."""
        return max(self.prefix_tokens, *map(_fixed_tokens, self.cache.layers))

    @property
    def rebuilt_tokens(self) -> float:
        """Prefix tokens that the last forward rebuilt, averaged over layers."""
        return self.cache.rebuilt_tokens if isinstance(self.cache, XKVCache) else 0.0

    @property
    def tail_bytes(self) -> int:
        """Bytes of what is held besides the prefix: what this conversation costs."""
        return tail_bytes(self.cache, self.prefix_tokens)

    def enabled(self) -> AbstractContextManager[Any]:
        """Within it the model can read the cache."""
        return enable_xkv(self.model) if isinstance(self.cache, XKVCache) else nullcontext()

    def advance(self, ids: Sequence[int]) -> torch.Tensor:
        """Run the model over tokens behind those held.

        Args:
            ids: at least one token.

        Returns:
            Logits [vocabulary], float32, behind the last.
        """
        self._mend()
        for start in range(0, len(ids), CHUNK_TOKENS):
            logits = self._forward(list(ids[start : start + CHUNK_TOKENS]))
        return logits[0, -1].float()

    def rewind(self, tokens: int) -> None:
        """Forget what is behind the first `tokens` tokens; where layers cannot go back, the whole tail.

        They cannot in a sliding window, in a state, and in tokens that were folded into factors.
        """
        self._mend()
        if len(self.ids) <= tokens:
            return
        self._torn = True
        del self.ids[max(tokens, self.prefix_tokens) :]
        self._mend()

    @property
    def exact_tokens(self) -> int:
        """Tokens behind the prefix that are held exactly."""
        return len(self.ids) - self.fixed_tokens

    def refuse_unfoldable(self) -> None:
        """Refuse a cache whose tail cannot be folded.

        Raises:
            CacheMisuse: it is exact. UnsupportedModel: latent attention, or an index of landmarks.
        """
        if not isinstance(self.cache, XKVCache):
            raise CacheMisuse("an exact cache has no factors to fold a tail into")
        for layer in self.cache.layers:
            if isinstance(layer, PrefixLayer):
                refuse_unfoldable(layer.selection.prefix)

    def fold(self, keep: int, error: float) -> int:
        """Make all but the last `keep` tokens of the tail into factors; returns how many.

        Raises:
            CacheMisuse: the cache is exact. As `XKVCache.fold`.
        """
        self._mend()
        self.refuse_unfoldable()
        folded: int = self.cache.fold(keep=keep, error=error)
        return folded

    def fork(self) -> Context:
        """A second context with the same tokens; both go on by themselves."""
        self._mend()
        other = copy.copy(self)
        other.cache, other.ids = _fork(self.cache), self.ids[:]
        return other

    @contextmanager
    def extending(self, ids: Sequence[int]) -> Iterator[None]:
        """Run the model over `ids` inside the block; what it leaves half done the next call mends."""
        self._mend()
        self._torn = True
        yield
        self.ids.extend(ids)
        self._torn = False

    def _forward(self, ids: list[int]) -> torch.Tensor:
        extra = {"logits_to_keep": 1} if self._takes_positions else {}
        with self.extending(ids), torch.no_grad():
            given = torch.tensor([ids], device=self.model.device)
            out: Any = self.model(input_ids=given, past_key_values=self.cache, use_cache=True, **extra)
        logits: torch.Tensor = out.logits
        return logits

    def _mend(self) -> None:
        """Bring every layer to the tokens in `ids`."""
        if not self._torn:
            return
        if self.can_crop and len(self.ids) >= self.fixed_tokens:
            for layer in self.cache.layers:
                _trim(layer, len(self.ids))
        else:
            self.cache = _fork(self._origin)
            del self.ids[self.prefix_tokens :]
        self._torn = False


def _can_crop(layer: Any) -> bool:
    """Whether the layer keeps keys and values of every token."""
    return (
        isinstance(layer, DynamicLayer)
        and not layer.is_sliding
        and not isinstance(layer, LinearAttentionLayer)
    )


def _fixed_tokens(layer: Any) -> int:
    """Tokens that the layer has as factors: the prefix's, and those folded behind it."""
    return layer.prefix_tokens if isinstance(layer, PrefixLayer) else 0


def _trim(layer: Any, tokens: int) -> None:
    """Leave the first `tokens` tokens of a layer, whatever of an update was done."""
    kept = tokens - _fixed_tokens(layer)
    for name in ("keys", "values"):
        states = getattr(layer, name)
        if states is not None and states.ndim > 1:
            setattr(layer, name, states[..., :kept, :])


def _fork(cache: Cache) -> Cache:
    if isinstance(cache, XKVCache):
        return cache.fork()
    other = copy.copy(cache)
    other.layers = [_fork_layer(layer) for layer in cache.layers]
    return other


def _fork_layer(layer: Any) -> Any:
    """Keys and values grow by making new tensors, so they are shared; states are changed in place."""
    return copy_state_layer(layer) if isinstance(layer, LinearAttentionLayer) else copy.copy(layer)
