"""Conversations between their turns: found again by the tokens they hold, without an id from the client."""

from __future__ import annotations

import itertools
import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from transformers.cache_utils import LinearAttentionLayer

from xkv_artifacts.keys import DIGEST_BYTES, joined_block_hashes, token_bytes
from xkv_artifacts.prefix_index import common_tokens
from xkv_service.decoding.growing_layer import GrowingLayer
from xkv_service.sessions.context import Context

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KeptTail:
    """What one conversation holds: a context, and the artifact its prefix comes from (None: it is exact)."""

    context: Context
    artifact_id: str | None
    namespace: str
    digests: tuple[bytes, ...]
    nbytes: int


class KeptTails:
    """Contexts under a budget of bytes; the least recently kept or taken go first.

    Contexts are found by a chain of digests over blocks of 64 tokens, then compared token by token: a wrong
    digest can cost time, never a wrong token. Not for several threads.

    Args:
        budget_bytes: of all tails together, the prefixes behind them not counted.
        fingerprint: of the model.
        on_drop: told the artifact of each tail that is dropped, if it has one: its prefix is held no longer.
        on_evict: told before that of each tail that has to leave although its conversation may go on.
            Where that fails, the tail is lost, and nothing else.
    """

    def __init__(
        self,
        budget_bytes: int,
        fingerprint: str,
        on_drop: Callable[[str], None] = lambda _: None,
        on_evict: Callable[[KeptTail], None] | None = None,
    ) -> None:
        self.budget_bytes, self.nbytes, self._fingerprint = budget_bytes, 0, fingerprint
        self._on_drop, self._on_evict = on_drop, on_evict
        self._kept: OrderedDict[int, KeptTail] = OrderedDict()
        self._places: dict[bytes, list[int]] = {}
        self._names = itertools.count()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, context: Context, namespace: str, artifact_id: str | None) -> None:
        """Keep a context and the hold on its prefix; what it continues is dropped.

        One shorter than a block or larger than the budget is dropped at once.
        """
        digests, size = self._digests(namespace, token_bytes(context.ids)), held_bytes(context)
        if not digests or size > self.budget_bytes:
            self._told(artifact_id)
            return
        for name in self._sharing(digests):
            older = self._kept[name].context.ids
            # The last token tells most apart.
            if context.ids[len(older) - 1 : len(older)] == older[-1:] and context.ids[: len(older)] == older:
                self._drop(name)
        while self.nbytes + size > self.budget_bytes:
            self._evict(next(iter(self._kept)))
        name = next(self._names)
        self._kept[name] = KeptTail(context, artifact_id, namespace, digests, size)
        self.nbytes += size
        for digest in digests:
            self._places.setdefault(digest, []).append(name)

    def take(
        self,
        prompt: Sequence[int],
        namespace: str,
        may_use: Callable[[KeptTail, int], bool] = lambda kept, tokens: True,
    ) -> KeptTail | None:
        """The context that holds most of a prompt, as a fork that holds nothing else; None: none helps.

        At least the prompt's last token is left to compute.

        Args:
            may_use: asked of a tail, and of how many of the prompt's tokens it holds.
        """
        tokens, ids = token_bytes(prompt), array("i", prompt)
        best, most = None, 0
        for name in self._sharing(self._digests(namespace, tokens)):
            kept = self._kept[name]
            # One token tells most apart: of use is what holds more than was found, and than its prefix.
            at = min(max(most, kept.context.prefix_tokens), len(kept.context.ids) - 1)
            if kept.context.ids[at : at + 1] != ids[at : at + 1]:
                continue
            held = usable_tokens(kept.context, tokens)
            if held > most and may_use(kept, held):
                best, most = name, held
        if best is None:
            return None
        self._kept.move_to_end(best)
        found = self._kept[best]
        context = found.context.fork()
        context.rewind(most)
        return KeptTail(context, found.artifact_id, namespace, (), 0)

    def free_a_prefix(self, besides: Collection[str] = ()) -> bool:
        """Drop the tails behind the prefix that was used least recently; False where none has one.

        Args:
            besides: prefixes that would not leave if nobody held them.
        """
        last_used: dict[str, int] = {}
        for name, kept in self._kept.items():
            if kept.artifact_id is not None and kept.artifact_id not in besides:
                last_used.pop(kept.artifact_id, None)
                last_used[kept.artifact_id] = name
        if not last_used:
            return False
        for name in self._behind(next(iter(last_used))):
            self._evict(name)
        return True

    def forget(self, artifact_id: str) -> None:
        """Drop the tails behind a prefix for good."""
        for name in self._behind(artifact_id):
            self._drop(name)

    def clear(self) -> None:
        """Let all leave, the most recently used first: what is stored of them may have to end early."""
        for name in reversed(list(self._kept)):
            self._evict(name)

    def _behind(self, artifact_id: str) -> list[int]:
        return [name for name, kept in self._kept.items() if kept.artifact_id == artifact_id]

    def _sharing(self, digests: Sequence[bytes]) -> list[int]:
        """Names of contexts that share the most blocks."""
        for digest in reversed(digests):
            if found := self._places.get(digest):
                return list(found)
        return []

    def _digests(self, namespace: str, tokens: bytes) -> tuple[bytes, ...]:
        return tuple(_pieces(joined_block_hashes(self._fingerprint, namespace, tokens)))

    def _evict(self, name: int) -> None:
        if self._on_evict is not None:
            try:
                self._on_evict(self._kept[name])
            except Exception:  # noqa: BLE001 - the room is needed, and the others must not go with it
                _log.exception("a tail was lost as it left memory")
        self._drop(name)

    def _drop(self, name: int) -> None:
        gone = self._kept.pop(name)
        self.nbytes -= gone.nbytes
        for digest in gone.digests:
            places = self._places[digest]
            places.remove(name)
            if not places:
                del self._places[digest]
        self._told(gone.artifact_id)

    def _told(self, artifact_id: str | None) -> None:
        if artifact_id is not None:
            self._on_drop(artifact_id)


def usable_tokens(context: Context, prompt: bytes) -> int:
    """Tokens of the prompt that the context holds and can go back to; 0 where only a prefix is left.

    Args:
        prompt: as `token_bytes`.
    """
    common = min(common_tokens(token_bytes(context.ids), prompt), len(prompt) // 4 - 1)
    if common == len(context.ids):
        return common
    return common if context.can_crop and common > context.fixed_tokens else 0


def held_bytes(context: Context) -> int:
    """Bytes of a context behind its prefix: the room that its tails grow into included, and all token ids."""
    ids = context.ids.itemsize * len(context.ids)
    return ids + context.tail_bytes + sum(_ahead(layer) for layer in context.cache.layers)


def _ahead(layer: object) -> int:
    if not isinstance(layer, GrowingLayer) or isinstance(layer, LinearAttentionLayer) or layer.keys is None:
        return 0
    return max(0, layer.nbytes - int(layer.keys.nbytes + layer.values.nbytes))


def _pieces(joined: bytes) -> Iterator[bytes]:
    for start in range(0, len(joined), DIGEST_BYTES):
        yield joined[start : start + DIGEST_BYTES]
