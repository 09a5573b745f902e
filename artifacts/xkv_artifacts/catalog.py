"""The catalog in Redis: entries, the prefix index, leases and rates. It holds no tensors.

Nothing Redis says is trusted: entries are parsed, and a match counts as far as the blob's tokens agree.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xkv_artifacts import prefix_index
from xkv_artifacts.calibration_entry import CALIBRATION_KEY, CALIBRATIONS_KEY, CalibrationEntry
from xkv_artifacts.entry import REBUILD_HINT, Entry
from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import (
    BLOCK_TOKENS,
    DIGEST_BYTES,
    check_namespace,
    is_artifact_id,
    joined_block_hashes,
)
from xkv_artifacts.lease import Lease
from xkv_artifacts.listing import STORE_KEYS, Listing
from xkv_artifacts.prefix_index import big_endian, member
from xkv_artifacts.redis_link import RedisLink

if TYPE_CHECKING:
    import redis

ENTRY_KEY = STORE_KEYS + "entry:{id}"  # hash: see Entry
RECENCY_KEY = STORE_KEYS + "recency"  # sorted set: every artifact id, by the second it was last used
PREFIXES_KEY = STORE_KEYS + "prefixes:{fingerprint}:{namespace}"  # sorted set: see prefix_index
LONGEST_KEY = STORE_KEYS + "longest:{fingerprint}:{namespace}"  # string: no artifact has more full blocks
LEASE_KEY = STORE_KEYS + "lease:{id}"  # string: the owner, with an expiry
RATES_KEY = STORE_KEYS + "rates"  # hash: "fingerprint device" -> tokens per second
BUILT_KEY = STORE_KEYS + "built"  # string: set once the catalog lists what the store holds

# KEYS: entry, recency, prefixes, longest. ARGV: id, member, its full blocks, last used, then the entry's
# fields and values. Where an index is there and `longest` is not, nobody knows it, and it stays missing.
_PUBLISH = """
local used = redis.call('ZSCORE', KEYS[2], ARGV[1])
local longest = tonumber(redis.call('GET', KEYS[4]) or redis.call('EXISTS', KEYS[3]) == 0 and -1)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('ZADD', KEYS[2], math.max(tonumber(ARGV[4]), tonumber(used or 0)), ARGV[1])
if longest and longest < tonumber(ARGV[3]) then redis.call('SET', KEYS[4], ARGV[3]) end
redis.call('ZADD', KEYS[3], 0, ARGV[2])
return 1
"""
_PAGE = 500
_BLOCK_BYTES = 4 * BLOCK_TOKENS


class Catalog:
    """The catalog of one store.

    Args:
        link: connection to Redis.
        store_id: names the store, so that several can share a Redis.

    Every method raises CatalogUnavailable when Redis does not answer within the link's patience.
    """

    def __init__(self, link: RedisLink, store_id: str) -> None:
        self.link = link
        self.store_id = store_id
        self._listing = Listing(link, Entry, self._key(ENTRY_KEY, id=""), self._key(RECENCY_KEY))
        calibrations = self._key(CALIBRATION_KEY, id=""), self._key(CALIBRATIONS_KEY)
        self.calibrations = Listing(link, CalibrationEntry, *calibrations)
        self._longest: dict[tuple[str, str], int] = {}  # as Redis said last, by fingerprint and namespace

    def publish(self, entry: Entry, tokens: bytes) -> None:
        """Add or replace an entry and its place in the prefix index, in one step.

        Args:
            tokens: token ids as little-endian int32 bytes.
        """
        index = self._index_keys(entry.fingerprint, entry.namespace)
        keys = [self._listing.entry_key(entry.id), self._key(RECENCY_KEY), *index]
        place = member(entry.fingerprint, entry.namespace, tokens, entry.id)
        fields = [text for pair in entry.to_hash().items() for text in pair]
        blocks = str(len(tokens) // _BLOCK_BYTES)
        self._script(_PUBLISH, keys, [entry.id, place, blocks, repr(entry.last_used), *fields])

    def get(self, artifact_id: str) -> Entry | None:
        """The entry of an artifact, or None.

        Raises:
            CatalogError: there is one, but it is damaged.
        """
        return self._listing.get(artifact_id)

    def entries(self, on_fault: Callable[[CatalogError], None] | None = None) -> list[Entry]:
        """All entries, most recently used first.

        Args:
            on_fault: told of each damaged entry; such entries are left out.
        """
        return self._listing.entries(on_fault)

    def ids(self) -> list[str]:
        """All artifact ids, most recently used first (and whatever else somebody put there)."""
        return self._listing.ids()

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
        whole = len(tokens) // _BLOCK_BYTES
        blocks = min(whole, self._longest.get(owner, prefix_index.FIRST_BLOCKS))
        shared, longest, found = self._search(owner, tokens, blocks)
        if longest > 0:  # else namespaces that hold nothing would fill the memory
            self._longest[owner] = longest
        if shared == blocks < min(whole, longest):
            found = self._search(owner, tokens, min(whole, longest))[2]
        return list(dict.fromkeys(found))

    def _search(self, owner: tuple[str, str], tokens: bytes, blocks: int) -> tuple[int, int, list[str]]:
        """What `_nearest` says of a prompt's first blocks and the partial one that follows them."""
        tokens = tokens[: (blocks + 1) * _BLOCK_BYTES - 4]
        digests = joined_block_hashes(*owner, tokens)
        keys = self._index_keys(*owner)
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
        end = (len(digests) // DIGEST_BYTES + 1) * _BLOCK_BYTES
        part = big_endian(tokens[sent * _BLOCK_BYTES : end])
        answer = self._script(
            prefix_index.LOOKUP, keys, [digests, part, str(sent), self._listing.entry_key("")]
        )
        match answer:
            case [int(shared), longest, [*found]]:
                return shared, _upper_bound(longest), [_artifact_id(raw) for raw in found]
        raise CatalogError("the prefix index gave no list of ids", hint=REBUILD_HINT)

    def drop(self, artifact_id: str, *, patience_s: float | None = None) -> bool:
        """Forget an artifact, as `Listing.drop`; False when it was not known."""
        # The prefix index drops members without an entry later.
        return self._listing.drop(artifact_id, patience_s=patience_s)

    def touch(self, artifact_id: str) -> None:
        """Note that an artifact was used now; tried once, since nothing waits for it."""
        recency = self._key(RECENCY_KEY)
        self.link.call(lambda client: client.zadd(recency, {artifact_id: time.time()}, xx=True), patience_s=0)

    def clear(self) -> None:
        """Forget all entries, calibrations and the prefix index (leases and rates stay)."""
        entries = (ENTRY_KEY, RECENCY_KEY, CALIBRATION_KEY, CALIBRATIONS_KEY)
        for pattern in (*entries, PREFIXES_KEY, LONGEST_KEY, BUILT_KEY):
            self._delete(self._key(pattern, id="*", fingerprint="*", namespace="*"))

    def is_built(self) -> bool:
        """Whether the catalog lists what the store holds (False in an empty Redis)."""
        return self.link.call(lambda client: client.exists(self._key(BUILT_KEY))) == 1

    def set_built(self) -> None:
        """Note that the catalog lists what the store holds."""
        self.link.call(lambda client: client.set(self._key(BUILT_KEY), repr(time.time())))

    def lease(self, artifact_id: str, owner: str, ttl_s: float = 30.0) -> Lease | None:
        """Take the lease on an artifact id, or None when another owner has it.

        Use it as `with lease:`; it is renewed while the block runs and released at its end.
        """
        lease = Lease(self.link, self._key(LEASE_KEY, id=artifact_id), owner, ttl_s)
        return lease if lease.acquire() else None

    def lease_owner(self, artifact_id: str) -> str | None:
        """Who computes an artifact now, or None."""
        owner = self.link.call(lambda client: client.get(self._key(LEASE_KEY, id=artifact_id)))
        return owner.decode("utf-8", "replace") if isinstance(owner, bytes) else None

    def remember_rate(self, fingerprint: str, device: str, tokens_per_second: float) -> None:
        """Keep how fast a model was precomputed on a kind of device, for estimates."""
        field = f"{fingerprint} {device}"
        self.link.call(lambda client: client.hset(self._key(RATES_KEY), field, repr(tokens_per_second)))

    def rate(self, fingerprint: str, device: str) -> float | None:
        """Tokens per second remembered for a model and device, or None."""
        raw = self.link.call(lambda client: client.hget(self._key(RATES_KEY), f"{fingerprint} {device}"))
        try:
            rate = float(raw) if raw is not None else 0.0
        except ValueError:
            return None
        return rate if 0.0 < rate < float("inf") else None

    def _key(self, pattern: str, **parts: str) -> str:
        return pattern.format(store=self.store_id, **parts)

    def _index_keys(self, fingerprint: str, namespace: str) -> list[str]:
        names = {"fingerprint": fingerprint, "namespace": namespace}
        return [self._key(PREFIXES_KEY, **names), self._key(LONGEST_KEY, **names)]

    def _script(self, text: str, keys: list[str], arguments: list[str | bytes]) -> Any:
        return self.link.script(text, keys, arguments)

    def _delete(self, pattern: str) -> None:
        def command(client: redis.Redis) -> None:
            page = []
            for key in client.scan_iter(match=pattern, count=_PAGE):
                page.append(key)
                if len(page) == _PAGE:
                    client.unlink(*page)
                    page.clear()
            if page:
                client.unlink(*page)

        self.link.call(command)


def _artifact_id(raw: Any) -> str:
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)
    if not is_artifact_id(text):
        raise CatalogError(f"the prefix index holds {text[:80]!r}, which is no id", hint=REBUILD_HINT)
    return text


def _upper_bound(raw: Any) -> int:
    """A number of blocks; what is missing or no number bounds nothing."""
    return int(raw) if isinstance(raw, bytes) and raw.isdigit() and len(raw) < 10 else sys.maxsize
