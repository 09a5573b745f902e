"""A list in Redis: a hash for each entry, and a sorted set of their ids. Nothing is believed unparsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from xkv_artifacts.entry import HashEntry, bad_entry
from xkv_artifacts.errors import CatalogError
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.redis_link import RedisLink

if TYPE_CHECKING:
    import redis

# Every key of one store starts with this; the number is the layout's version.
STORE_KEYS = "xkv:1:{store}:"

Kept = TypeVar("Kept", bound=HashEntry)
_Answer = tuple[Any, Any]

# KEYS: entry, order. ARGV: id.
_DROP = """
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
_PAGE = 500


class Listing(Generic[Kept]):
    """The entries of one kind.

    Args:
        link: connection to Redis.
        kind: what an entry is.
        entry_prefix: an entry's key without its id.
        order_key: the sorted set of ids, by the field `kind.score`.

    Every method raises CatalogUnavailable when Redis does not answer within the link's patience.
    """

    def __init__(self, link: RedisLink, kind: type[Kept], entry_prefix: str, order_key: str) -> None:
        self._link = link
        self._kind = kind
        self._entry_prefix = entry_prefix
        self.order_key = order_key

    def entry_key(self, artifact_id: str) -> str:
        """The hash of one entry."""
        return self._entry_prefix + artifact_id

    def get(self, artifact_id: str) -> Kept | None:
        """The entry of an id, or None.

        Raises:
            CatalogError: there is one, but it is damaged.
        """
        return self._parse(artifact_id, *self._fetch([artifact_id])[0])

    def entries(
        self, on_fault: Callable[[CatalogError], None] | None = None, ids: Sequence[str] | None = None
    ) -> list[Kept]:
        """All entries, highest score first, or those of `ids` in their order.

        Args:
            on_fault: told of each damaged entry; such entries are left out.
        """
        found = []
        for artifact_id, answer in self._fetch_all(self.ids() if ids is None else ids):
            try:
                entry = self._parse(artifact_id, *answer)
            except CatalogError as error:
                if on_fault is not None:
                    on_fault(error)
                continue
            if entry is not None:
                found.append(entry)
        return found

    def ids(self) -> list[str]:
        """All ids, highest score first (and whatever else somebody put there)."""
        raw: Any = self._link.call(lambda client: client.zrevrange(self.order_key, 0, -1))
        return [item.decode("utf-8", "replace") for item in raw]

    def put(self, entry: Kept) -> None:
        """Add or replace an entry, in one step."""
        key = self.entry_key(entry.id)

        def command(client: redis.Redis) -> None:
            pipeline = client.pipeline(transaction=True)
            pipeline.delete(key)
            pipeline.hset(key, items=[text for pair in entry.to_hash().items() for text in pair])
            pipeline.zadd(self.order_key, {entry.id: getattr(entry, entry.score)})
            pipeline.execute()

        self._link.call(command)

    def drop(self, artifact_id: str, *, patience_s: float | None = None) -> bool:
        """Forget an entry; False when it was not known.

        Args:
            patience_s: how long to wait for a Redis that does not answer; None: as the link does.
        """
        keys = [self.entry_key(artifact_id), self.order_key]
        return bool(self._link.script(_DROP, keys, [artifact_id], patience_s=patience_s))

    def _fetch_all(self, ids: Sequence[str]) -> Iterator[tuple[str, _Answer]]:
        for start in range(0, len(ids), _PAGE):
            page = ids[start : start + _PAGE]
            yield from zip(page, self._fetch(page), strict=True)

    def _fetch(self, ids: Sequence[str]) -> list[_Answer]:
        """Hash and score of each id, or the error that Redis answered."""

        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for artifact_id in ids:
                pipeline.hgetall(self.entry_key(artifact_id))
                pipeline.zscore(self.order_key, artifact_id)
            return pipeline.execute(raise_on_error=False)

        answers = self._link.call(command)
        return list(zip(answers[::2], answers[1::2], strict=True))

    def _parse(self, artifact_id: str, fields: Any, score: Any) -> Kept | None:
        if not is_artifact_id(artifact_id):
            raise bad_entry(artifact_id, "its name is not an artifact id")
        if not isinstance(fields, dict) or not isinstance(score, float | None):
            raise bad_entry(artifact_id, _reason(fields if not isinstance(fields, dict) else score))
        if not fields and score is None:
            return None
        if not fields:
            raise bad_entry(artifact_id, "it is listed, but has no fields")
        return self._kind.from_hash(artifact_id, fields, score or 0.0)


def _reason(answer: Any) -> str:
    return str(answer).splitlines()[0] if str(answer) else "an unknown answer"
