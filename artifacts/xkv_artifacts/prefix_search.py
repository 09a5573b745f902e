"""Asking the prefix index for a prompt: which few artifacts can share most with it. See `prefix_index`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from xkv_artifacts import prefix_index
from xkv_artifacts.entry import REBUILD_HINT
from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import (
    BLOCK_TOKENS,
    DIGEST_BYTES,
    check_namespace,
    is_artifact_id,
    joined_block_hashes,
)
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.prefix_index import big_endian
from xkv_artifacts.redis_link import RedisLink

PREFIXES_KEY: Final = STORE_KEYS + "prefixes:{fingerprint}:{namespace}"  # sorted set: see prefix_index
LONGEST_KEY: Final = (
    STORE_KEYS + "longest:{fingerprint}:{namespace}"
)  # string: no artifact has more full blocks
BLOCK_BYTES: Final = 4 * BLOCK_TOKENS


class PrefixSearch:
    """The prefix index of one catalog.

    Args:
        link: connection to Redis. store_id: names the store. entry_prefix: an entry's key without its id.
        expiry_key: the sorted set of when artifacts end.
        patterns: names of the sorted set and of the number of blocks of its longest artifact.
        models_pattern: name of the sorted set of a namespace's models; None: they are not told.
        patience_s: how long to wait for a Redis that does not answer; None: as the link does.
    """

    def __init__(
        self,
        link: RedisLink,
        store_id: str,
        entry_prefix: str,
        expiry_key: str,
        *,
        patterns: tuple[str, str] = (PREFIXES_KEY, LONGEST_KEY),
        models_pattern: str | None = None,
        patience_s: float | None = None,
    ) -> None:
        self._link = link
        self._patterns, self._models_pattern, self._patience_s = patterns, models_pattern, patience_s
        self._store_id = store_id
        self._entry_prefix = entry_prefix
        self._expiry_key = expiry_key
        self._longest: dict[tuple[str, str], int] = {}  # as Redis said last, by fingerprint and namespace
        self._others: dict[
            tuple[str, str], list[str]
        ] = {}  # other models, as it said when nothing was shared

    def keys(self, fingerprint: str, namespace: str) -> list[str]:
        """The sorted set of a model and namespace, and the number of blocks of its longest artifact."""
        names = {"store": self._store_id, "fingerprint": fingerprint, "namespace": namespace}
        return [pattern.format(**names) for pattern in self._patterns]

    def candidates(self, fingerprint: str, namespace: str, tokens: bytes) -> list[str]:
        """The few artifacts that can share the longest prefix with a prompt.

        One round trip, or two where the prompt goes on for more than `prefix_index.SENT_BLOCKS` blocks after
        what it shares; one more where it shares all blocks that the longest artifact had at the last lookup,
        and there are longer ones now. At most four prefixes, each with up to `prefix_index.MOST_SPECS`
        artifacts of it.

        Args:
            tokens: the prompt's token ids as little-endian int32 bytes.

        Raises:
            CatalogError: the answer holds something else than ids.
        """
        owner = (fingerprint, check_namespace(namespace))
        whole = len(tokens) // BLOCK_BYTES
        blocks = min(whole, self._longest.get(owner, prefix_index.FIRST_BLOCKS))
        nearest = self._search(owner, tokens, blocks)
        if nearest.longest > 0:  # else namespaces that hold nothing would fill the memory
            self._longest[owner] = nearest.longest
        if nearest.shared == 0:
            self._note_others(owner, nearest.models)
        if nearest.shared == blocks < min(whole, nearest.longest):
            nearest = self._search(owner, tokens, min(whole, nearest.longest))
        return list(dict.fromkeys(nearest.found))

    def candidates_of_other_models(
        self, fingerprint: str, namespaces: Sequence[str], tokens: bytes
    ) -> tuple[tuple[str, str], list[str]] | None:
        """Of the other models that `candidates` was told of, when nothing was shared in these namespaces: the
        one whose index shares most with a prompt's first `prefix_index.MODEL_BLOCKS` blocks.

        One round trip, tried once; none where there are no other models. What cannot be understood of an
        answer is no answer.

        Args:
            tokens: the prompt's token ids as little-endian int32 bytes.

        Returns:
            Its fingerprint and namespace, and up to four ids; None where no block is shared.
        """
        owners = [(other, name) for name in namespaces for other in self._others.get((fingerprint, name), ())]
        tokens = tokens[: (prefix_index.MODEL_BLOCKS + 1) * BLOCK_BYTES - 4]
        if not owners or len(tokens) < BLOCK_BYTES:
            return None
        calls = [
            (
                [*self.keys(*owner), self._expiry_key],
                self._arguments(joined_block_hashes(*owner, tokens), tokens),
            )
            for owner in owners
        ]
        best, most = None, 0
        for owner, answer in zip(owners, self._link.script_each(prefix_index.LOOKUP, calls), strict=True):
            with suppress(CatalogError):
                nearest = _Nearest.parse(answer)
                if nearest.shared > most:
                    best, most = (owner, nearest.found), nearest.shared
        return best

    def whole_candidates(self, fingerprint: str, namespace: str, tokens: bytes) -> list[str]:
        """The longest artifacts that a prompt begins with, to their last token. One round trip.

        Args:
            tokens: the prompt's token ids as little-endian int32 bytes.

        Raises:
            CatalogError: the answer holds something else than ids.
        """
        owner = (fingerprint, check_namespace(namespace))
        keys = [*self.keys(*owner), self._expiry_key]
        arguments: list[str | bytes] = [
            joined_block_hashes(*owner, tokens),
            big_endian(tokens),
            self._entry_prefix,
        ]
        match self._link.script(prefix_index.LOOKUP_WHOLE, keys, arguments):
            case [*found]:
                return [_artifact_id(raw) for raw in found]
        raise CatalogError("the prefix index gave no list of ids", hint=REBUILD_HINT)

    def _note_others(self, owner: tuple[str, str], models: list[str]) -> None:
        """Remember the other models of a namespace that hold something there, as Redis said now."""
        others = [model for model in models if model != owner[0]][: prefix_index.MOST_MODELS]
        if others:
            self._others[owner] = others
        else:
            self._others.pop(owner, None)

    def _search(self, owner: tuple[str, str], tokens: bytes, blocks: int) -> _Nearest:
        """What is nearest to a prompt's first blocks and the partial one that follows them."""
        tokens = tokens[: (blocks + 1) * BLOCK_BYTES - 4]
        digests = joined_block_hashes(*owner, tokens)
        keys = [*self.keys(*owner), self._expiry_key]
        if self._models_pattern is not None:
            keys.append(self._models_pattern.format(store=self._store_id, namespace=owner[1]))
        sent = max(0, blocks - prefix_index.SENT_BLOCKS)
        nearest = self._nearest(keys, digests, tokens, sent)
        if nearest.shared < sent:
            digests = digests[: nearest.shared * DIGEST_BYTES]
            nearest.found.extend(self._nearest(keys, digests, tokens, nearest.shared).found)
        return nearest

    def _nearest(self, keys: list[str], digests: bytes, tokens: bytes, sent: int) -> _Nearest:
        """Ask once. `sent` is the block from which on tokens are sent."""
        arguments = self._arguments(digests, tokens, sent, prefix_index.MOST_SPECS)
        answer = self._link.script(prefix_index.LOOKUP, keys, arguments, patience_s=self._patience_s)
        return _Nearest.parse(answer)

    def _arguments(self, digests: bytes, tokens: bytes, sent: int = 0, specs: int = 1) -> list[str | bytes]:
        """Of `LOOKUP`."""
        end = (len(digests) // DIGEST_BYTES + 1) * BLOCK_BYTES
        part = big_endian(tokens[sent * BLOCK_BYTES : end])
        return [digests, part, str(sent), self._entry_prefix, str(specs)]


@dataclass(frozen=True)
class _Nearest:
    """What `LOOKUP` answers.

    Args:
        shared: blocks that the nearest artifacts share with the digests. longest: the most that any has.
        found: ids. models: fingerprints, where nothing is shared.
    """

    shared: int
    longest: int
    found: list[str]
    models: list[str]

    @classmethod
    def parse(cls, answer: Any) -> _Nearest:
        """An answer of Redis.

        Raises:
            CatalogError: it is none.
        """
        match answer:
            case [int(shared), longest, [*found], [*models]]:
                ids = [_artifact_id(raw) for raw in found]
                return cls(shared, _upper_bound(longest), ids, _fingerprints(models))
        raise CatalogError("the prefix index gave no list of ids", hint=REBUILD_HINT)


def _artifact_id(raw: Any) -> str:
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)
    if not is_artifact_id(text):
        raise CatalogError(f"the prefix index holds {text[:80]!r}, which is no id", hint=REBUILD_HINT)
    return text


def _upper_bound(raw: Any) -> int:
    """A number of blocks; what is missing or no number bounds nothing."""
    return int(raw) if isinstance(raw, bytes) and raw.isdigit() and len(raw) < 10 else sys.maxsize


def _fingerprints(raw: list[Any]) -> list[str]:
    """Those of them that are some: 64 hex digits, as ids are."""
    texts = [one.decode("ascii", "replace") if isinstance(one, bytes) else "" for one in raw]
    return [text for text in texts if is_artifact_id(text)]
