"""The catalog in Redis: entries, the prefix index, leases and rates. It holds no tensors.

Nothing Redis says is trusted: entries are parsed, and a match counts as far as the blob's tokens agree.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from xkv_artifacts import damage_board, entry_scripts
from xkv_artifacts.calibration_entry import CALIBRATION_KEY, CALIBRATIONS_KEY, CalibrationEntry
from xkv_artifacts.entry import Entry, spec_digest, spec_text
from xkv_artifacts.errors import CatalogError, CatalogUnavailable
from xkv_artifacts.lease import Lease
from xkv_artifacts.limits import UNLIMITED, Quota
from xkv_artifacts.listing import STORE_KEYS, Listing
from xkv_artifacts.namespace_index import (
    INDEXED_KEY,
    MODELS_KEY,
    NAMESPACE_KEY,
    PAGE,
    SUMS_KEY,
    NamespaceIndex,
)
from xkv_artifacts.prefix_index import member
from xkv_artifacts.prefix_search import BLOCK_BYTES, LONGEST_KEY, PREFIXES_KEY, PrefixSearch
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.retention import Retention

if TYPE_CHECKING:
    import redis

ENTRY_KEY = STORE_KEYS + "entry:{id}"  # hash: see Entry
RECENCY_KEY = STORE_KEYS + "recency"  # sorted set: every artifact id, by the second it was last used
LEASE_KEY = STORE_KEYS + "lease:{id}"  # string: the owner, with an expiry
EXPIRY_KEY = STORE_KEYS + "expiry"  # sorted set: unpinned artifact ids that end, by the second they do
READERS_KEY = STORE_KEYS + "readers:{id}"  # sorted set: who reads the blob now, by when the mark runs out
DELETED_KEY = STORE_KEYS + "deleted:{id}"  # string: set when it was deleted or collected, for DELETED_S
CHANGING_KEY = STORE_KEYS + "changing:{id}"  # string: who changes its pin or time to live now
RATES_KEY = STORE_KEYS + "rates"  # hash: "fingerprint device" -> tokens per second
SPECS_KEY = STORE_KEYS + "specs"  # hash: digest -> a compression spec as JSON
BUILT_KEY = STORE_KEYS + "built"  # string: set once the catalog lists what the store holds
LISTING_KEY = STORE_KEYS + "listing:{id}"  # string: set while somebody lists the store, with an expiry

_LISTING_S: Final = 7 * 24 * 3600
"""Longer than a store takes to be listed."""
COLLECTING_S: Final = 60.0
"""A collector's lease on an artifact that it deletes: one file, however slow its disk."""
DELETED_S: Final = 3600
"""Seconds for which it is known that an artifact was deleted: longer than anybody takes from reading a blob
to listing it.
"""
MOST_SPECS: Final = 4096
"""More are not kept, and none longer than MOST_SPEC_CHARS (guesses: a store has a few, of 250 characters). A
blob's spec may say anything; what has one that is not kept is not made again by itself where it is lost."""
MOST_SPEC_CHARS: Final = 4096
Reason = Literal["expired", "quota", "budget"]
Listed = Literal["pinned", "listed", "ended", "unlisted"]


@dataclass(frozen=True)
class Bound:
    """What a namespace (of "quota") or the whole catalog (of "budget") is to be brought down to."""

    namespace: str = ""
    bytes: int | None = None
    artifacts: int | None = None


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
        self.namespaces = NamespaceIndex(link, store_id, self._listing.entry_key(""), self._key(RECENCY_KEY))
        self.calibrations = Listing(link, CalibrationEntry, *calibrations)
        places = self._listing.entry_key(""), self._key(EXPIRY_KEY)
        self.prefixes = PrefixSearch(link, store_id, *places, models_pattern=MODELS_KEY)
        self.candidates = self.prefixes.candidates
        self.whole_candidates = self.prefixes.whole_candidates

    def publish(self, entry: Entry, tokens: bytes, quota: Quota = UNLIMITED) -> bool:
        """Add or replace an entry and its place in the prefix index, in one step.

        Args:
            tokens: token ids as little-endian int32 bytes.
            quota: what the entry's namespace may hold with it.

        Returns:
            False when that is more than the quota; nothing is changed then.
        """
        prefixes = self.prefixes.keys(entry.fingerprint, entry.namespace)
        place = member(entry.fingerprint, entry.namespace, tokens, entry.id)
        texts: list[str | bytes] = [
            *(place, str(len(tokens) // BLOCK_BYTES), repr(entry.last_used), entry.namespace),
            *(entry.fingerprint, str(entry.bytes), _text(entry.expires), str(entry.pinned)),
            *(_text(quota.bytes), _text(quota.artifacts)),
            *(text for pair in entry.to_hash().items() for text in pair),
        ]
        more_keys = [*prefixes, self.namespaces.indexed_key]
        return bool(self._change(entry_scripts.PUBLISH, entry.id, texts, more_keys=more_keys))

    def keep_spec(self, spec: Mapping[str, Any]) -> None:
        """Keep what the `spec` of an entry stands for, for whoever has to make a lost artifact again.

        A few specs make all artifacts of a store, and a text in each entry would cost more than the entry.
        """
        text = spec_text(spec)
        if len(text) <= MOST_SPEC_CHARS:
            texts = [spec_digest(spec), text, str(MOST_SPECS)]
            self.link.script(entry_scripts.KEEP_SPEC, [self._key(SPECS_KEY)], texts)

    def get(self, artifact_id: str) -> Entry | None:
        """The entry of an artifact, or None.

        Raises:
            CatalogError: there is one, but it is damaged.
        """
        return self._listing.get(artifact_id)

    def entries(
        self, on_fault: Callable[[CatalogError], None] | None = None, ids: Sequence[str] | None = None
    ) -> list[Entry]:
        """All entries, most recently used first, or those of `ids` in their order.

        Args:
            on_fault: told of each damaged entry; such entries are left out.
        """
        return self._listing.entries(on_fault, ids)

    def ids(self) -> list[str]:
        """All artifact ids, most recently used first (and whatever else somebody put there)."""
        return self._listing.ids()

    def drop(self, artifact_id: str, *, patience_s: float | None = None) -> bool:
        """Forget an artifact; False when it was not known.

        Args:
            patience_s: how long to wait for a Redis that does not answer; None: as the link does.
        """
        # The prefix index drops members without an entry later.
        return bool(self._change(entry_scripts.DROP, artifact_id, patience_s=patience_s))

    def delete(self, artifact_id: str) -> bool:
        """Forget an artifact whose blob is about to be deleted; False when it was not known."""
        return bool(self._change(entry_scripts.DELETE, artifact_id, [str(DELETED_S)]))

    def forget_deletion(self, artifact_id: str) -> None:
        """An artifact that may have been deleted is wanted again: its blob is about to be written.

        Tried once; where it fails, the blob is not missed for a while.
        """
        with suppress(CatalogUnavailable, CatalogError):
            key = self._key(DELETED_KEY, id=artifact_id)
            self.link.call(lambda client: client.delete(key), patience_s=0)

    def miss(self, artifact_id: str) -> Retention | None:
        """Forget an artifact whose blob is gone, and note it on the `DamageBoard`; tried once.

        Returns:
            What the catalog says was promised of it. None: it was not known, or deleted, or its time is over;
            nothing is noted then.
        """
        bounds = [str(damage_board.KEEP_S), str(damage_board.MOST_NOTES)]
        more_keys = [self._key(damage_board.DAMAGED_KEY), self._key(SPECS_KEY)]
        texts = [damage_board.MISSING, *bounds]
        answer = self._change(entry_scripts.MISS, artifact_id, texts, more_keys=more_keys, patience_s=0)
        match answer:
            case [bytes(pinned), bytes(expires)]:
                return _promised(pinned, expires)
        return None

    def touch(self, artifact_id: str) -> None:
        """Note that an artifact was used now; tried once, since nothing waits for it."""
        self._change(entry_scripts.TOUCH, artifact_id, patience_s=0)

    def listed(self, ids: Sequence[str]) -> dict[str, Listed]:
        """How some artifacts stand: pinned, listed and not pinned, ended by Redis's clock, or not listed;
        tried once.
        """

        def ask(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            pipeline.time()
            for artifact_id in ids:
                key = self._listing.entry_key(artifact_id)
                pipeline.exists(key)
                pipeline.hget(key, "pinned")
                pipeline.zscore(self._key(EXPIRY_KEY), artifact_id)
            return list(pipeline.execute())

        (seconds, microseconds), *said = self.link.call(ask, patience_s=0)
        now = seconds + microseconds / 1e6
        answers = zip(said[::3], said[1::3], said[2::3], strict=True)
        return {artifact_id: _listed(*answer, now) for artifact_id, answer in zip(ids, answers, strict=True)}

    def retain(self, artifact_id: str, retention: Retention) -> bool:
        """Repeat what an artifact's retention file says (or will say); False where it has no entry."""
        texts = [str(retention.pinned), _text(retention.expires)]
        return bool(self._change(entry_scripts.RETAIN, artifact_id, texts))

    def mark_read(self, artifact_id: str, reader: str, ttl_s: float) -> bool:
        """Note that `reader` reads the blob for the next seconds, and that it was used now; tried once.

        Returns:
            False where the artifact's time is over.
        """
        texts = [reader, repr(ttl_s)]
        return bool(self._change(entry_scripts.READ, artifact_id, texts, patience_s=0))

    def unmark_read(self, artifact_id: str, reader: str) -> None:
        """Take a mark back; tried once."""
        key = self._key(READERS_KEY, id=artifact_id)
        self.link.call(lambda client: client.zrem(key, reader), patience_s=0)

    def renew_reads(self, marks: Mapping[str, str], ttl_s: float) -> None:
        """Let marks (artifact by reader) last for the next seconds again; tried once."""
        texts = [text for reader, artifact_id in marks.items() for text in (artifact_id, reader)]
        arguments = [self._key(READERS_KEY, id=""), repr(ttl_s), *texts]
        self.link.script(entry_scripts.RENEW_READS, [], arguments, patience_s=0)

    def collect(self, artifact_id: str, reason: Reason, seen: float, collector: str, bound: Bound) -> str:
        """Drop an entry because of a reason, if that still holds and nobody reads or computes the artifact.
        The lease on it is `collector`'s then, for COLLECTING_S.

        Args:
            seen: its last use as the collector saw it; used since, it stays (but for "expired").
            bound: of the reasons "quota" and "budget".

        Returns:
            "dropped", or why not: "gone", "kept" (its time is not over), "used", "pinned", "enough" (no more
            than the bound is stored), "read", "leased".
        """
        bounds = [bound.namespace, _text(bound.bytes), _text(bound.artifacts)]
        texts = [reason, collector, str(int(1000 * COLLECTING_S)), repr(seen), *bounds, str(DELETED_S)]
        answer = self._change(entry_scripts.COLLECT, artifact_id, texts)
        return answer.decode("ascii", "replace") if isinstance(answer, bytes) else str(answer)

    def release(self, artifact_id: str, owner: str) -> None:
        """Give a lease back that `collect` took; where that fails, it runs out by itself."""
        with suppress(CatalogUnavailable, CatalogError):
            Lease(self.link, self._key(LEASE_KEY, id=artifact_id), owner, COLLECTING_S).release(patience_s=0)

    @contextmanager
    def changing(self, artifact_id: str) -> Iterator[None]:
        """Be the only one to change what is promised of an artifact while the block runs.

        Raises:
            CatalogError: somebody else has been at it for 10 s.
        """
        lease = Lease(self.link, self._key(CHANGING_KEY, id=artifact_id), uuid.uuid4().hex, 10.0)
        deadline = time.monotonic() + 10.0
        while not lease.acquire():
            if time.monotonic() > deadline:
                raise CatalogError(
                    f"artifact {artifact_id} is being changed by somebody else", hint="try again"
                )
            time.sleep(0.02)
        with lease:
            yield

    def expired(self, now: float, start: int = 0) -> list[str]:
        """A page of ids whose time is over, longest first, from rank `start` on.

        (And whatever else somebody put there.)
        """
        key = self._key(EXPIRY_KEY)
        raw: Any = self.link.call(lambda client: client.zrangebyscore(key, "-inf", now, start, PAGE))
        return [item.decode("utf-8", "replace") for item in raw]

    def oldest(self, start: int, namespace: str | None = None) -> list[tuple[str, float]]:
        """A page of ids with the second of their last use, longest unused first, from rank `start` on."""
        key = self._key(RECENCY_KEY) if namespace is None else self.namespaces.key(namespace)
        raw: Any = self.link.call(lambda client: client.zrange(key, start, start + PAGE - 1, withscores=True))
        return [(identity.decode("utf-8", "replace"), float(used)) for identity, used in raw]

    def now(self) -> float:
        """Seconds since the epoch by the clock of Redis, the one that all machines share."""
        seconds, microseconds = self.link.call(lambda client: client.time())
        return float(seconds) + microseconds / 1e6

    def clear(self) -> None:
        """Forget all entries, calibrations and the prefix index (leases and rates stay)."""
        entries = (ENTRY_KEY, RECENCY_KEY, CALIBRATION_KEY, CALIBRATIONS_KEY)
        index = (PREFIXES_KEY, LONGEST_KEY, EXPIRY_KEY, NAMESPACE_KEY, SUMS_KEY, SPECS_KEY)
        built = (BUILT_KEY, LISTING_KEY)
        # INDEXED_KEY last: without it the others are made again.
        for pattern in (*entries, *index, *built, INDEXED_KEY):
            self._delete(self._key(pattern, id="*", fingerprint="*", namespace="*"))

    def is_built(self) -> bool:
        """Whether the catalog lists what the store holds (False in an empty Redis)."""
        return self.link.call(lambda client: client.exists(self._key(BUILT_KEY))) == 1

    def begin_listing(self) -> str:
        """Note that all that the store holds is being listed; returns what `set_built` is told."""
        listing = uuid.uuid4().hex
        key = self._key(LISTING_KEY, id=listing)
        self.link.call(lambda client: client.set(key, repr(time.time()), ex=_LISTING_S))
        return listing

    def set_built(self, listing: str) -> bool:
        """Note that the catalog lists what the store holds; False: it was emptied since `begin_listing`."""
        keys = (self._key(LISTING_KEY, id=listing), self._key(BUILT_KEY))
        return bool(self.link.script(entry_scripts.SET_BUILT, keys, [repr(time.time())]) == 1)

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

    def _change(
        self,
        script: str,
        artifact_id: str,
        texts: Sequence[str | bytes] = (),
        *,
        more_keys: Sequence[str] = (),
        patience_s: float | None = None,
    ) -> Any:
        """Run one of `entry_scripts` on an entry."""
        keys = [
            *(self._listing.entry_key(artifact_id), self._key(RECENCY_KEY), self._key(EXPIRY_KEY)),
            *(self.namespaces.sums_key, self._key(LEASE_KEY, id=artifact_id)),
            *(self._key(READERS_KEY, id=artifact_id), self._key(DELETED_KEY, id=artifact_id), *more_keys),
        ]
        arguments = [artifact_id, self.namespaces.prefix, *texts]
        return self.link.script(script, keys, arguments, patience_s=patience_s)

    def _delete(self, pattern: str) -> None:
        def command(client: redis.Redis) -> None:
            page = []
            for key in client.scan_iter(match=pattern, count=PAGE):
                page.append(key)
                if len(page) == PAGE:
                    client.unlink(*page)
                    page.clear()
            if page:
                client.unlink(*page)

        self.link.call(command)


def _listed(there: int, pinned: bytes | None, ends: float | None, now: float) -> Listed:
    if not there:
        return "unlisted"
    if pinned == b"True":
        return "pinned"
    return "ended" if ends is not None and ends <= now else "listed"


def _promised(pinned: bytes, expires: bytes) -> Retention:
    """What an entry's fields promise; what is no number is no end."""
    try:
        return Retention.model_validate({"pinned": pinned == b"True", "expires": float(expires or "nan")})
    except ValueError:
        return Retention(pinned=pinned == b"True")


def _text(value: float | None) -> str:
    """A number for a script; "" for none."""
    return "" if value is None else repr(value)
