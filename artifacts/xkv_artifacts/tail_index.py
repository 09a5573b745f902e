"""`TailIndex`: stored tails in the catalog: found by their tokens, in order of use and of their end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from xkv_artifacts import entry_scripts, tail_scripts
from xkv_artifacts.entry import REBUILD_HINT
from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import is_artifact_id, joined_block_hashes
from xkv_artifacts.listing import STORE_KEYS, Listing
from xkv_artifacts.prefix_index import member, shared_tokens
from xkv_artifacts.prefix_search import BLOCK_BYTES, PrefixSearch
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.tail_entry import TailEntry, TailMatch

_START: Final = STORE_KEYS + "tail"
ENTRY_KEY: Final = _START + ":{id}"  # hash: see TailEntry
USED_KEY: Final = _START + "-used"  # sorted set: every tail's id, by the second it was last used
EXPIRY_KEY: Final = _START + "-expiry"  # sorted set: every tail's id, by the second it ends
SUM_KEY: Final = _START + "-bytes"  # string: bytes of all tails
PLACES_KEY: Final = _START + "-places"  # hash: id -> its member of the prefix index
SHARES_KEY: Final = _START + "-shares"  # sorted set: namespaces, by the bytes of their tails
NAMESPACE_KEY: Final = (
    _START + "-namespace:{namespace}"
)  # sorted set: its tails' ids, by the second of last use
READERS_KEY: Final = _START + "-readers:{id}"  # sorted set: who reads the blob now, by when the mark runs out
PREFIXES_KEY: Final = _START + "-prefixes:{fingerprint}:{namespace}"  # sorted set: see prefix_index
LONGEST_KEY: Final = _START + "-longest:{fingerprint}:{namespace}"  # string: no tail has more full blocks

_ONCE: Final = 0.0
"""Patience where a request or its tail waits: nothing is lost but time, so Redis is asked once."""
_PAGE: Final = 500


class TailIndex:
    """Stored tails in the catalog of one store. A tail counts as used when it is listed, read or touched.

    Args:
        link: connection to Redis. store_id: names the store.

    Every method raises CatalogUnavailable when Redis does not answer, and CatalogError when what it answers
    cannot be.
    """

    def __init__(self, link: RedisLink, store_id: str) -> None:
        self._link = link
        self._start = _START.format(store=store_id)
        keys = USED_KEY, EXPIRY_KEY, SUM_KEY, PLACES_KEY, SHARES_KEY
        self._keys = [key.format(store=store_id) for key in keys]
        self._listing = Listing(link, TailEntry, ENTRY_KEY.format(store=store_id, id=""), self._keys[0])
        self._search = PrefixSearch(
            link,
            store_id,
            self._listing.entry_key(""),
            self._keys[1],
            patterns=(PREFIXES_KEY, LONGEST_KEY),
            patience_s=_ONCE,
        )

    def publish(self, entry: TailEntry, tokens: bytes, ttl_s: float, budget: int) -> tuple[int, list[str]]:
        """List a tail, and drop others until all of them keep the budget: again and again what the namespace
        that holds most has not used for longest.

        So a namespace loses nothing while it holds no more than the budget divided by the namespaces that
        have tails. What is being read stays.

        Args:
            tokens: all of the conversation, as little-endian int32 bytes.
            ttl_s: seconds until it ends. budget: bytes of all tails.

        Returns:
            Bytes of all tails then, and the ids of those dropped: the new one alone where it would take from
            namespaces that hold less than its own.
        """
        owner = entry.fingerprint, entry.namespace
        place = member(*owner, tokens, entry.id)
        fields = [text for pair in entry.to_hash().items() for text in pair]
        numbers = [str(len(tokens) // BLOCK_BYTES), str(entry.bytes), repr(ttl_s), str(budget)]
        texts: list[str | bytes] = [entry.id, place, *numbers, entry.namespace, *fields]
        answer = self._run(tail_scripts.PUBLISH, texts, self._search.keys(*owner), patience_s=_ONCE)
        match answer:
            case [int(total), [*dropped]]:
                return total, [name for name in map(_text, dropped) if is_artifact_id(name)]
        raise CatalogError("the list of stored tails gave no ids", hint=REBUILD_HINT)

    def find(self, fingerprint: str, namespace: str, tokens: bytes) -> list[TailMatch]:
        """The stored tails that share most with a prompt, best first; damaged entries are left out.

        Args:
            tokens: the prompt's token ids as little-endian int32 bytes.
        """
        ids = self._search.candidates(fingerprint, namespace, tokens)
        if not ids:
            return []
        raw: Any = self._link.call(lambda client: client.hmget(self._keys[3], ids), patience_s=_ONCE)
        places = dict(zip(ids, raw, strict=True))
        digests = joined_block_hashes(fingerprint, namespace, tokens)
        found = []
        for entry in self._listing.entries(ids=ids):
            place = places[entry.id]
            if isinstance(place, bytes) and (entry.fingerprint, entry.namespace) == (fingerprint, namespace):
                found.append(TailMatch(entry, shared_tokens(place, digests, tokens)))
        return sorted(found, key=lambda match: (-match.shared, match.entry.bytes))

    def touch(self, tail_id: str) -> bool:
        """Note that a tail was used now; False where it is not listed, or has ended."""
        return bool(self._run(tail_scripts.TOUCH, [tail_id], patience_s=_ONCE))

    def drop(self, tail_id: str, why: Literal["ended", "unused", "gone"]) -> bool:
        """Forget a tail; False where there was none.

        Args:
            why: "ended" only if its time is over and nobody reads it, "unused" only if nobody reads it.
        """
        return bool(self._run(tail_scripts.DROP, [tail_id, why]))

    def mark_read(self, artifact_id: str, reader: str, ttl_s: float) -> bool:
        """As `Catalog.mark_read`; False too where the tail is not listed."""
        return bool(self._run(tail_scripts.READ, [artifact_id, reader, repr(ttl_s)], patience_s=_ONCE))

    def unmark_read(self, artifact_id: str, reader: str) -> None:
        """Take a mark back; tried once."""
        key = f"{self._start}-readers:{artifact_id}"
        self._link.call(lambda client: client.zrem(key, reader), patience_s=_ONCE)

    def renew_reads(self, marks: Mapping[str, str], ttl_s: float) -> None:
        """Let marks (tail by reader) last for the next seconds again; tried once."""
        texts = [text for reader, tail_id in marks.items() for text in (tail_id, reader)]
        arguments = [f"{self._start}-readers:", repr(ttl_s), *texts]
        self._link.script(entry_scripts.RENEW_READS, [], arguments, patience_s=_ONCE)

    def expired(self, start: int = 0) -> dict[str, TailEntry | None]:
        """A page of the tails whose time is over by id, longest first, from rank `start` on.

        None stands for an entry that is lost or damaged; such an id may be anything.
        """
        seconds, microseconds = self._link.call(lambda client: client.time())
        now = float(seconds) + microseconds / 1e6
        raw: Any = self._link.call(
            lambda client: client.zrangebyscore(self._keys[1], "-inf", now, start, _PAGE)
        )
        names = [_text(item) for item in raw]
        entries = {entry.id: entry for entry in self._listing.entries(ids=names)}
        return {name: entries.get(name) for name in names}

    def drop_damaged(self) -> None:
        """Drop what is listed without a good entry, unless it is read: nobody finds it."""
        names = self.ids()
        good = {entry.id for entry in self._listing.entries(ids=names)}
        for name in names:
            if name not in good:
                self.drop(name, "unused")

    def ids(self) -> list[str]:
        """The ids of all tails, last used first (and whatever else somebody put there)."""
        return self._listing.ids()

    def recount(self) -> None:
        """Count the bytes of all tails and of each namespace again: they drift where Redis evicts keys."""
        was: Any = self._link.call(lambda client: client.get(self._keys[2]))
        shares: Counter[str] = Counter()
        names: defaultdict[str, list[str]] = defaultdict(list)
        for entry in self._listing.entries():
            shares[entry.namespace] += entry.bytes
            names[entry.namespace].append(entry.id)
        for namespace, ids in names.items():
            self._place(namespace, ids)
        told = [text for namespace, held in shares.items() for text in (namespace, str(held))]
        before = was if isinstance(was, bytes) else ""
        self._run(tail_scripts.CORRECT, [before, str(shares.total()), *told])

    def _place(self, namespace: str, ids: list[str]) -> None:
        """Put tails into their namespace's set, and take out of it what is not listed any more."""
        key = f"{self._start}-namespace:{namespace}"
        raw: Any = self._link.call(lambda client: client.zrange(key, 0, -1))
        ids = sorted({*ids, *map(_text, raw)})
        for first in range(0, len(ids), _PAGE):
            self._run(tail_scripts.PLACE, [namespace, *ids[first : first + _PAGE]])

    def _run(
        self,
        script: str,
        texts: Sequence[str | bytes],
        more_keys: Sequence[str] = (),
        *,
        patience_s: float | None = None,
    ) -> Any:
        keys = [*self._keys, *more_keys]
        return self._link.script(script, keys, [self._start, *texts], patience_s=patience_s)


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
