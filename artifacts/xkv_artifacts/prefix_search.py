"""Asking the prefix index for a prompt: which few artifacts can share most with it. See `prefix_index`."""

from __future__ import annotations

import sys
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
        patience_s: float | None = None,
    ) -> None:
        self._link = link
        self._patterns, self._patience_s = patterns, patience_s
        self._store_id = store_id
        self._entry_prefix = entry_prefix
        self._expiry_key = expiry_key
        self._longest: dict[tuple[str, str], int] = {}  # as Redis said last, by fingerprint and namespace

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
        shared, longest, found = self._search(owner, tokens, blocks)
        if longest > 0:  # else namespaces that hold nothing would fill the memory
            self._longest[owner] = longest
        if shared == blocks < min(whole, longest):
            found = self._search(owner, tokens, min(whole, longest))[2]
        return list(dict.fromkeys(found))

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

    def _search(self, owner: tuple[str, str], tokens: bytes, blocks: int) -> tuple[int, int, list[str]]:
        """What `_nearest` says of a prompt's first blocks and the partial one that follows them."""
        tokens = tokens[: (blocks + 1) * BLOCK_BYTES - 4]
        digests = joined_block_hashes(*owner, tokens)
        keys = [*self.keys(*owner), self._expiry_key]
        sent = max(0, blocks - prefix_index.SENT_BLOCKS)
        shared, longest, found = self._nearest(keys, digests, tokens, sent)
        if shared < sent:
            found += self._nearest(keys, digests[: shared * DIGEST_BYTES], tokens, shared)[2]
        return shared, longest, found

    def _nearest(
        self, keys: list[str], digests: bytes, tokens: bytes, sent: int
    ) -> tuple[int, int, list[str]]:
        """Blocks that the nearest artifacts share with the digests, the most that any has, and the ids.

        Args:
            sent: the block from which on tokens are sent.
        """
        end = (len(digests) // DIGEST_BYTES + 1) * BLOCK_BYTES
        part = big_endian(tokens[sent * BLOCK_BYTES : end])
        arguments: list[str | bytes] = [digests, part, str(sent), self._entry_prefix]
        answer = self._link.script(prefix_index.LOOKUP, keys, arguments, patience_s=self._patience_s)
        match answer:
            case [int(shared), longest, [*found]]:
                return shared, _upper_bound(longest), [_artifact_id(raw) for raw in found]
        raise CatalogError("the prefix index gave no list of ids", hint=REBUILD_HINT)


def _artifact_id(raw: Any) -> str:
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)
    if not is_artifact_id(text):
        raise CatalogError(f"the prefix index holds {text[:80]!r}, which is no id", hint=REBUILD_HINT)
    return text


def _upper_bound(raw: Any) -> int:
    """A number of blocks; what is missing or no number bounds nothing."""
    return int(raw) if isinstance(raw, bytes) and raw.isdigit() and len(raw) < 10 else sys.maxsize
