"""Artifacts by namespace: in order of last use, and how much they are, without reading those of others.

One sorted set per namespace, and one hash with a sum of bytes per namespace and of all ("*"). They are kept
right by `entry_scripts`; here they are read, made for a catalog of an earlier version, and counted again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from xkv_artifacts.entry import REBUILD_HINT
from xkv_artifacts.errors import CatalogError, InvalidCursor
from xkv_artifacts.listing import STORE_KEYS
from xkv_artifacts.redis_link import RedisLink

if TYPE_CHECKING:
    import redis

NAMESPACE_KEY: Final = STORE_KEYS + "namespace:{namespace}"  # sorted set: its artifacts, by last use
MODELS_KEY: Final = (
    NAMESPACE_KEY + ":models"
)  # sorted set: fingerprints, by how many artifacts it has of each
SUMS_KEY: Final = STORE_KEYS + "bytes"  # hash: namespace -> bytes of its artifacts; "*": of all
INDEXED_KEY: Final = STORE_KEYS + "indexed"  # string: set once every entry stands in its namespace's set
PAGE: Final = 500
"""Entries of one round trip, where all are gone through."""
ALL: Final = "*"
_CURSOR = re.compile(r"(-?[0-9.e+-]{1,32}):([^\s]{0,128})", re.ASCII)

# Puts entries into their namespaces' sets. KEYS: recency, sums. ARGV: start of entries' keys, start of
# namespaces' keys, ids.
_ADD = """
for i = 3, #ARGV do
  local found = redis.pcall('HMGET', ARGV[1] .. ARGV[i], 'namespace', 'bytes')
  local used = redis.call('ZSCORE', KEYS[1], ARGV[i])
  local name, bytes = found[1], found[2]
  if not found.err and used and name and #name <= 64 and string.match(name, '^[%w._-]+$')
    and redis.call('ZADD', ARGV[2] .. name, 'NX', used, ARGV[i]) == 1 then
    bytes = bytes and #bytes <= 15 and string.match(bytes, '^%d+$') and tonumber(bytes) or 0
    redis.call('HINCRBY', KEYS[2], name, bytes)
    redis.call('HINCRBY', KEYS[2], '*', bytes)
  end
end
"""

# Drops ids that have no entry of this namespace (any more). KEYS: the namespace's set. ARGV: start of
# entries' keys, namespace, ids.
_DROP_GONE = """
for i = 3, #ARGV do
  local namespace = redis.pcall('HGET', ARGV[1] .. ARGV[i], 'namespace')
  if namespace ~= ARGV[2] then redis.call('ZREM', KEYS[1], ARGV[i]) end
end
"""

# Sets a sum that nobody changed since it was read. KEYS: sums. ARGV: namespace, as read or '', the right one.
_CORRECT = """
local is = redis.call('HGET', KEYS[1], ARGV[1])
if (is or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""

# The members that follow a place, highest score first. KEYS: sorted set. ARGV: score, member, how many. What
# was scored anew meanwhile moves the others' ranks, so the place is searched by its score and member.
_PAGE = """
local from = redis.call('ZCOUNT', KEYS[1], '(' .. ARGV[1], '+inf')
local low, high = from, from + redis.call('ZCOUNT', KEYS[1], ARGV[1], ARGV[1])
while low < high do
  local middle = math.floor((low + high) / 2)
  local member = redis.call('ZREVRANGE', KEYS[1], middle, middle)[1]
  if member < ARGV[2] then high = middle else low = middle + 1 end
end
return redis.call('ZREVRANGE', KEYS[1], low, low + ARGV[3] - 1, 'WITHSCORES')
"""


@dataclass(frozen=True)
class Usage:
    """What a namespace holds: bytes and number of its artifacts, and how much of that is pinned."""

    bytes: int
    artifacts: int
    pinned_bytes: int = 0
    pinned: int = 0


def page_of(
    link: RedisLink, key: str, cursor: str | None, limit: int
) -> tuple[list[tuple[str, float]], str | None]:
    """Some members of a sorted set with their scores, highest first, and the cursor of the next page.

    Args:
        cursor: where the page before ended; None: the first one.

    Raises:
        InvalidCursor, CatalogUnavailable, CatalogError
    """
    if cursor is None:
        raw: Any = link.call(lambda client: client.zrevrange(key, 0, limit - 1, withscores=True))
        found = [(_text(member), float(score)) for member, score in raw]
    else:
        match = _CURSOR.fullmatch(cursor)
        if match is None or not _is_number(match[1]):
            raise InvalidCursor(
                f"{cursor[:80]!r} is no cursor", hint="give the one that the page before came with"
            )
        answer = link.script(_PAGE, [key], [match[1], match[2], str(limit)])
        found = [(_text(answer[i]), float(answer[i + 1])) for i in range(0, len(answer), 2)]
    last = found[-1] if len(found) == limit else None
    return found, last and _cursor(*last)


def _cursor(member: str, score: float) -> str:
    return f"{score!r}:{member}"


class NamespaceIndex:
    """The namespaces of one catalog.

    Args:
        link: connection to Redis. store_id: names the store. entry_prefix: an entry's key without its id.
        recency_key: the sorted set of all ids.

    Every method raises CatalogUnavailable, and CatalogError where Redis holds something else there.
    """

    def __init__(self, link: RedisLink, store_id: str, entry_prefix: str, recency_key: str) -> None:
        self._link = link
        self._entry_prefix = entry_prefix
        self._recency = recency_key
        self.sums_key = SUMS_KEY.format(store=store_id)
        self.indexed_key = INDEXED_KEY.format(store=store_id)
        self.prefix = NAMESPACE_KEY.format(store=store_id, namespace="")

    def key(self, namespace: str) -> str:
        """The sorted set of a namespace's artifacts."""
        return self.prefix + namespace

    def page(
        self, namespace: str, cursor: str | None, limit: int
    ) -> tuple[list[tuple[str, float]], str | None]:
        """Some of a namespace's ids with the second of their last use, last used first; see `page_of`."""
        self.ensure()
        return page_of(self._link, self.key(namespace), cursor, limit)

    def cursor_of(self, namespace: str, artifact_id: str) -> str | None:
        """The cursor of the page behind an artifact; None: it is none of this namespace."""
        self.ensure()
        score = self._link.call(lambda client: client.zscore(self.key(namespace), artifact_id))
        return None if score is None else _cursor(artifact_id, float(score))

    def holds(self, namespaces: Iterable[str], artifact_id: str) -> bool:
        """Whether an artifact is of one of these namespaces.

        The same is asked and answered for an artifact of another namespace as for one that does not exist.
        """
        self.ensure()

        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for namespace in namespaces:
                pipeline.zscore(self.key(namespace), artifact_id)
            return pipeline.execute()

        return any(score is not None for score in self._link.call(command))

    def usages(self) -> dict[str, Usage]:
        """What each namespace holds that holds something, as counted, by name."""
        self.ensure()
        sums = {name: size for name, size in sorted(self._sums().items()) if name != ALL and size != 0}
        names = list(sums)
        found = {}
        for page in (names[start : start + PAGE] for start in range(0, len(names), PAGE)):
            counts = self._link.call(lambda client, page=page: self._counts(client, page))  # type: ignore[misc]
            found.update({name: Usage(sums[name], int(n)) for name, n in zip(page, counts, strict=True)})
        return found

    def usage(self, namespace: str) -> Usage:
        """What a namespace holds, as counted."""
        self.ensure()

        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=True)
            pipeline.hget(self.sums_key, namespace)
            pipeline.zcard(self.key(namespace))
            return pipeline.execute()

        raw, artifacts = self._link.call(command)
        return Usage(_sum(namespace, raw), int(artifacts))

    def total(self) -> int:
        """Bytes of all artifacts, as counted."""
        self.ensure()
        return _sum(ALL, self._link.call(lambda client: client.hget(self.sums_key, ALL)))

    def ensure(self) -> None:
        """Put every entry into its namespace's set, where a catalog of an earlier version has none."""
        if self._link.call(lambda client: client.exists(self.indexed_key)):
            return
        for page in self._ids(self._recency):
            self._link.script(_ADD, [self._recency, self.sums_key], [self._entry_prefix, self.prefix, *page])
        self._link.call(lambda client: client.set(self.indexed_key, 1))

    def recount(self, namespace: str) -> Usage:
        """Count a namespace again, entry by entry, and set its sum right; ids without an entry are dropped.

        A namespace that changes all the while keeps the sum that it has: the next count sets it right.
        """
        self.ensure()
        for _ in range(3):
            before = self._link.call(lambda client: client.hget(self.sums_key, namespace))
            usage = self._count(namespace)
            if self._correct(namespace, before, usage.bytes):
                break
        return usage

    def recount_all(self) -> None:
        """Count every namespace again, and the sum of all."""
        self.ensure()
        for name in self._sums(lenient=True):
            if name != ALL:
                self.recount(name)
        for _ in range(3):
            before = self._link.call(lambda client: client.hget(self.sums_key, ALL))
            total = sum(size for name, size in self._sums(lenient=True).items() if name != ALL)
            if self._correct(ALL, before, total):
                break

    def _count(self, namespace: str) -> Usage:
        size = artifacts = pinned_bytes = pinned = 0
        key, seen = self.key(namespace), set[str]()
        for page in self._ids(key):
            page = [identity for identity in page if identity not in seen]
            seen.update(page)
            fields = self._fields(page)
            gone = [
                identity for identity, found in zip(page, fields, strict=True) if not _of(found, namespace)
            ]
            if gone:
                self._link.script(_DROP_GONE, [key], [self._entry_prefix, namespace, *gone])
            for found in fields:
                if _of(found, namespace):
                    own = _size(found[1])
                    kept = found[2] == b"True"
                    size, artifacts = size + own, artifacts + 1
                    pinned_bytes, pinned = pinned_bytes + own * kept, pinned + kept
        return Usage(size, artifacts, pinned_bytes, pinned)

    def _counts(self, client: redis.Redis, names: list[str]) -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.zcard(self.key(name))
        return pipeline.execute()

    def _fields(self, ids: list[str]) -> list[Any]:
        def command(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for artifact_id in ids:
                pipeline.hmget(self._entry_prefix + artifact_id, ["namespace", "bytes", "pinned"])
            return pipeline.execute(raise_on_error=False)

        return self._link.call(command)

    def _ids(self, key: str) -> Iterator[list[str]]:
        """The members of a sorted set in pages; one may come twice where others come and go meanwhile."""
        cursor = 0
        while True:
            cursor, found = self._link.call(lambda client, at=cursor: client.zscan(key, at, count=PAGE))  # type: ignore[misc]
            if found:
                yield [_text(member) for member, _ in found]
            if cursor == 0:
                return

    def _correct(self, name: str, before: Any, size: int) -> bool:
        seen = before if isinstance(before, bytes) else b""
        return bool(self._link.script(_CORRECT, [self.sums_key], [name, seen, str(size)]))

    def _sums(self, *, lenient: bool = False) -> dict[str, int]:
        raw: Any = self._link.call(lambda client: client.hgetall(self.sums_key))
        return {
            _text(name): 0 if lenient and not _is_sum(size) else _sum(_text(name), size)
            for name, size in raw.items()
        }


def _of(fields: Any, namespace: str) -> bool:
    return isinstance(fields, list) and fields[0] == namespace.encode()


def _size(raw: Any) -> int:
    return int(raw) if isinstance(raw, bytes) and raw.isdigit() and len(raw) <= 15 else 0


def _is_sum(raw: Any) -> bool:
    return isinstance(raw, bytes) and re.fullmatch(rb"-?\d{1,18}", raw) is not None


def _sum(name: str, raw: Any) -> int:
    if raw is None:
        return 0
    if not _is_sum(raw):
        raise CatalogError(
            f"the bytes of namespace {name[:64]!r} are {raw[:40]!r} in the catalog", hint=REBUILD_HINT
        )
    return int(raw)


def _text(raw: Any) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
