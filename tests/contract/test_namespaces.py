"""One namespace's artifacts without reading the others': pages, sums, and catalogs without an index."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import sample
from redis_server import RedisServer

from xkv_artifacts.catalog import ENTRY_KEY, Catalog
from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import CatalogError, InvalidCursor, InvalidNamespace
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.namespace_index import INDEXED_KEY, NAMESPACE_KEY, SUMS_KEY, Usage
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.store import ArtifactStore


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def entry(number: int, namespace: str, last_used: float, size: int = 1000) -> Entry:
    manifest, _ = sample(range(5), namespace=namespace)
    made = Entry.of_manifest(manifest, size=size, last_used=last_used)
    return made.model_copy(update={"id": f"{number:064x}"})


def publish(catalog: Catalog, number: int, namespace: str, last_used: float, size: int = 1000) -> str:
    made = entry(number, namespace, last_used, size)
    catalog.publish(made, token_bytes([number]))
    return made.id


def pages(catalog: Catalog, namespace: str, limit: int) -> list[str]:
    seen, cursor = [], None
    while True:
        page, cursor = catalog.namespaces.page(namespace, cursor, limit)
        seen += [artifact_id for artifact_id, _ in page]
        if cursor is None:
            return seen


def keys_of(catalog: Catalog, pattern: str, **parts: str) -> str:
    return pattern.format(store=catalog.store_id, **parts)


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
def test_pages_hold_each_artifact_once_whatever_ties_there_are(catalog: Catalog, limit: int) -> None:
    source = random.Random(limit)
    for number in range(40):
        publish(catalog, number, source.choice("ab"), float(source.choice((1, 2, 3))))
    for namespace in "ab":
        expected = [found.id for found in catalog.entries() if found.namespace == namespace]
        assert pages(catalog, namespace, limit) == expected


def test_what_is_used_or_dropped_between_pages_moves_no_other(catalog: Catalog) -> None:
    ids = [publish(catalog, number, "a", 5.0) for number in range(20)]
    page, cursor = catalog.namespaces.page("a", None, 5)
    catalog.touch(page[-1][0])
    catalog.drop(page[-2][0])
    publish(catalog, 99, "a", 9.0)
    seen = [artifact_id for artifact_id, _ in page]
    while cursor is not None:
        page, cursor = catalog.namespaces.page("a", cursor, 5)
        seen += [artifact_id for artifact_id, _ in page]
    assert sorted(seen) == sorted(ids)


def test_which_namespace_an_artifact_is_of(catalog: Catalog) -> None:
    name = publish(catalog, 1, "a", 5.0)
    assert catalog.namespaces.holds(["a"], name) and catalog.namespaces.holds(["b", "a"], name)
    assert not catalog.namespaces.holds(["b"], name) and not catalog.namespaces.holds([], name)
    assert not catalog.namespaces.holds(["a"], "0" * 64)
    catalog.drop(name)
    assert not catalog.namespaces.holds(["a"], name)


def test_the_order_is_that_of_last_use(store: ArtifactStore) -> None:
    ids = [store.publish(*sample(range(length), namespace="a")).id for length in (10, 20, 30)]
    store.publish(*sample(range(10), namespace="b"))
    store.load(ids[0])
    found, cursor = store.page("a", limit=2)
    assert [item.id for item in found] == [ids[0], ids[2]]
    rest, end = store.page("a", cursor, 2)
    assert [item.id for item in rest] == [ids[1]] and end is None
    assert [item.last_used for item in found + rest] == [
        item.last_used for item in store.entries() if item.namespace == "a"
    ]
    assert store.page("nobody") == ([], None)
    with pytest.raises(InvalidNamespace):
        store.page("../x")


@pytest.mark.parametrize(
    "cursor", ["", "x", "1", "1:a b", "nan:a", "inf:a", "1e999:a", "1" * 99, ":", "--1:a"]
)
def test_a_cursor_that_no_page_gave_is_refused(store: ArtifactStore, cursor: str) -> None:
    with pytest.raises(InvalidCursor, match="no cursor"):
        store.page("a", cursor)


def test_a_page_reads_nothing_of_other_namespaces(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    for number in range(30):
        publish(catalog, number, "many" if number else "one", 1.0)
    catalog.namespaces.ensure()
    before = catalog.link.call(lambda client: client.info("commandstats"))
    found, _ = catalog.namespaces.page("one", None, 100)
    assert len(catalog.entries(ids=[artifact_id for artifact_id, _ in found])) == 1
    after = catalog.link.call(lambda client: client.info("commandstats"))

    def calls(info: dict[str, Any]) -> int:
        return int(info.get("cmdstat_hgetall", {"calls": 0})["calls"])

    assert calls(after) - calls(before) == 1


def test_sums_follow_what_is_published_replaced_and_dropped(catalog: Catalog) -> None:
    namespaces = catalog.namespaces
    first, second = publish(catalog, 1, "a", 1.0, 100), publish(catalog, 2, "b", 1.0, 50)
    publish(catalog, 1, "a", 1.0, 70)
    assert (namespaces.usage("a"), namespaces.usage("b"), namespaces.total()) == (
        Usage(70, 1),
        Usage(50, 1),
        120,
    )
    publish(catalog, 1, "b", 1.0, 30)  # an id has one namespace; should it ever change, the sums do too
    assert (namespaces.usage("a"), namespaces.usage("b")) == (Usage(0, 0), Usage(80, 2))
    assert namespaces.usages() == {"b": Usage(80, 2)}
    for artifact_id in (first, second, first):
        catalog.drop(artifact_id)
    assert namespaces.total() == 0 and namespaces.usages() == {}


def test_a_catalog_of_an_earlier_version_is_indexed_when_it_is_asked(catalog: Catalog) -> None:
    ids = [publish(catalog, number, "ab"[number % 2], float(number), 10) for number in range(1200)]

    def forget(client: Any) -> None:
        client.delete(keys_of(catalog, INDEXED_KEY), keys_of(catalog, SUMS_KEY))
        client.delete(*(keys_of(catalog, NAMESPACE_KEY, namespace=name) for name in "ab"))

    catalog.link.call(forget)
    # A new artifact is published before anybody asks, and one of the old ones has a damaged entry.
    new = publish(catalog, 5000, "a", 9999.0, 10)
    catalog.link.call(lambda client: client.set(keys_of(catalog, ENTRY_KEY, id=ids[3]), "junk") and None)
    expected = [new, *ids[::2][::-1]]
    assert pages(catalog, "a", 100) == expected
    assert catalog.namespaces.usage("a") == Usage(6010, 601)
    assert catalog.namespaces.usage("b") == Usage(5990, 599)
    assert catalog.namespaces.total() == 12_000


def test_an_index_without_its_entries_is_counted_right(catalog: Catalog) -> None:
    """As in a Redis that evicts keys when its memory is full."""
    ids = [publish(catalog, number, "a", 1.0, 100) for number in range(4)]
    catalog.link.call(lambda client: client.delete(keys_of(catalog, ENTRY_KEY, id=ids[0])))
    assert catalog.namespaces.usage("a") == Usage(400, 4)
    assert catalog.namespaces.recount("a") == Usage(300, 3) == catalog.namespaces.usage("a")


def test_a_wrong_type_is_one_clear_error(catalog: Catalog) -> None:
    publish(catalog, 1, "a", 1.0)
    for pattern in (NAMESPACE_KEY, SUMS_KEY):
        key = keys_of(catalog, pattern, namespace="a")
        catalog.link.call(lambda client, key=key: (client.delete(key), client.set(key, "x")))
        with pytest.raises(CatalogError) as caught:
            catalog.namespaces.usage("a")
        assert "rebuild" in caught.value.hint
        catalog.clear()
        publish(catalog, 1, "a", 1.0)


def test_two_catalogs_can_index_at_once(catalog: Catalog, redis_server: RedisServer) -> None:
    for number in range(50):
        publish(catalog, number, "a", 1.0, 10)
    link = RedisLink(redis_server.url)
    other = Catalog(link, catalog.store_id)
    catalog.link.call(lambda client: client.delete(keys_of(catalog, INDEXED_KEY)))
    other.namespaces.ensure()
    catalog.link.call(lambda client: client.delete(keys_of(catalog, INDEXED_KEY)))
    catalog.namespaces.ensure()
    assert other.namespaces.usage("a") == Usage(500, 50) == catalog.namespaces.usage("a")
    link.close()
