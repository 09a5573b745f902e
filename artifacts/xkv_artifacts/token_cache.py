"""Token ids of recently looked-up artifacts: an id stands for its tokens for ever, so they never go stale.

Fidelity and size come along. They only choose between artifacts that match equally well.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class OwnedTokens:
    """What a lookup compares of an artifact.

    Args:
        owner: model fingerprint and namespace. tokens: ids as little-endian int32 bytes.
        fidelity: top-1 agreement with the exact cache. size: bytes of the blob.
    """

    owner: tuple[str, str]
    tokens: bytes
    fidelity: float
    size: int


class TokenCache:
    """Keeps what was used last, up to `max_bytes` of tokens. Safe to use from several threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: OrderedDict[str, OwnedTokens] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, artifact_id: str) -> OwnedTokens | None:
        """The artifact's tokens if they are kept."""
        with self._lock:
            item = self._items.get(artifact_id)
            if item is not None:
                self._items.move_to_end(artifact_id)
            return item

    def put(self, artifact_id: str, item: OwnedTokens) -> None:
        """Keep an artifact's tokens, and drop those not used for longest when there are too many."""
        with self._lock:
            if artifact_id not in self._items:
                self._bytes += len(item.tokens)
            self._items[artifact_id] = item
            while self._bytes > self._max_bytes and len(self._items) > 1:
                self._bytes -= len(self._items.popitem(last=False)[1].tokens)
