"""Stored tails of conversations in a real Redis and a folder: found by their tokens, kept for a while."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from artifact_samples import FINGERPRINT, tail_sample
from redis_server import RedisServer

from xkv_artifacts import tail_index
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogUnavailable,
    CorruptArtifact,
    ForeignTail,
    QuotaExceeded,
)
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.readers import Readers
from xkv_artifacts.reports import TailUsage
from xkv_artifacts.store import ArtifactStore
from xkv_artifacts.tail_index import (
    ENTRY_KEY,
    EXPIRY_KEY,
    NAMESPACE_KEY,
    PLACES_KEY,
    SHARES_KEY,
    SUM_KEY,
    USED_KEY,
)
from xkv_artifacts.tail_shelf import UNLISTED_S

ROOM: dict[str, Any] = {"ttl_s": 60.0, "budget": 1 << 20}
WIDE = 1 << 30


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def talk(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * place) % 1000 for place in range(length)]


def put(store: ArtifactStore, ids: list[int], namespace: str = "default", **room: Any) -> str:
    """Store a tail of a conversation of these tokens; its id."""
    room = {**ROOM, **room}
    limits = {name: room.pop(name) for name in ROOM}
    manifest, tensors = tail_sample(ids, **room)
    before = set(store.tails.blobs.ids())
    store.tails.put(manifest, tensors, namespace, **limits)
    new = set(store.tails.blobs.ids()) - before
    return new.pop() if new else ""


def found(store: ArtifactStore, ids: list[int], namespace: str = "default") -> list[tuple[str, int]]:
    matches = store.tails.find(FINGERPRINT, namespace, token_bytes(ids))
    return [(match.id, match.shared) for match in matches if match.shared]


def keys(store: ArtifactStore) -> list[bytes]:
    pattern = f"xkv:1:{store.catalog.store_id}:tail*"
    return sorted(store.catalog.link.call(lambda client: client.keys(pattern)))


def agree(store: ArtifactStore) -> set[str]:
    """Ids of the blobs, which the catalog has to agree with, sums and places included."""
    blobs = set(store.tails.blobs.ids())
    link, name = store.catalog.link, store.catalog.store_id
    assert set(store.tails.index.ids()) == blobs
    assert link.call(lambda client: client.hlen(PLACES_KEY.format(store=name))) == len(blobs)
    total = link.call(lambda client: client.get(SUM_KEY.format(store=name)))
    assert int(total or 0) == sum(store.tails.blobs.sizes())
    held = shares(store)
    assert sum(held.values()) == int(total or 0)
    assert {one for namespace in held for one in names_of(store, namespace)} == blobs
    return blobs


def shares(store: ArtifactStore) -> dict[str, int]:
    """Bytes that each namespace holds, as the catalog counts."""
    key = SHARES_KEY.format(store=store.catalog.store_id)
    raw = store.catalog.link.call(lambda client: client.zrange(key, 0, -1, withscores=True))
    return {name.decode(): int(held) for name, held in raw}


def names_of(store: ArtifactStore, namespace: str) -> list[str]:
    """Ids of a namespace's tails, longest unused first."""
    key = NAMESPACE_KEY.format(store=store.catalog.store_id, namespace=namespace)
    return [name.decode() for name in store.catalog.link.call(lambda client: client.zrange(key, 0, -1))]


@pytest.mark.parametrize("length", [70, 128, 1000, 20_000])
def test_a_tail_is_found_by_the_prompt_that_goes_on_from_it(store: ArtifactStore, length: int) -> None:
    name = put(store, talk(length))
    put(store, talk(length, start=1))
    assert found(store, [*talk(length), 5, 6, 7])[0] == (name, length)
    manifest, tensors = store.tails.load(name, FINGERPRINT, "default", WIDE)
    assert tensors["tokens"].tolist() == talk(length) and manifest.artifact == "a" * 64
    agree(store)


def test_a_prompt_that_parts_from_a_tail_shares_what_it_shares(store: ArtifactStore) -> None:
    name = put(store, talk(400))
    assert found(store, [*talk(300), 1, 2, 3]) == [(name, 256)]  # inside a full block digests tell nothing
    assert found(store, [*talk(390), 999, 2]) == [(name, 390)]
    assert found(store, talk(400, start=3)) == []
    match = store.tails.find(FINGERPRINT, "default", token_bytes(talk(390)))[0]
    assert not match.whole and match.entry.tokens == 400


def test_the_tail_that_holds_most_comes_first(store: ArtifactStore) -> None:
    short, long = put(store, talk(130)), put(store, [*talk(130), *talk(100, start=9)])
    assert short not in agree(store)  # its conversation went on
    other = put(store, [*talk(130), *talk(30, start=4)])
    prompt = [*talk(130), *talk(100, start=9), 1]
    assert found(store, prompt)[0] == (long, 230)
    assert found(store, [*talk(130), *talk(30, start=4), 1])[0] == (other, 160)


def test_a_tail_behind_another_prefix_is_another_tail(store: ArtifactStore) -> None:
    one, two = put(store, talk(200)), put(store, talk(200), artifact=None, selection=None, prefix_tokens=0)
    assert one != two and agree(store) == {one, two}
    assert {name for name, _ in found(store, talk(201))} == {one, two}
    longer = put(store, talk(300))
    assert agree(store) == {two, longer}


def test_a_tail_that_is_there_is_not_written_again(store: ArtifactStore) -> None:
    name = put(store, talk(200))
    path = Path(store.blobs.url) / "tails" / name[:2] / f"{name}.xkv"
    os.utime(path, (1, 1))
    assert put(store, talk(200)) == "" and path.stat().st_mtime == 1
    path.unlink()
    assert put(store, talk(200)) == name and agree(store) == {name}


def test_namespaces_do_not_see_each_other(store: ArtifactStore) -> None:
    name = put(store, talk(200), "acme")
    assert found(store, talk(300)) == [] and found(store, talk(300), "acme") == [(name, 200)]
    with pytest.raises(ForeignTail):
        store.tails.load(name, FINGERPRINT, "default", WIDE)
    with pytest.raises(ForeignTail):
        store.tails.load(name, "0" * 64, "acme", WIDE)
    assert agree(store) == {name}  # nobody else's fault


def test_a_redis_that_lies_gives_no_foreign_tail(store: ArtifactStore) -> None:
    mine, theirs = put(store, talk(200)), put(store, talk(200), "acme")
    link, start = store.catalog.link, f"xkv:1:{store.catalog.store_id}:tail"
    link.call(lambda client: client.rename(f"{start}:{theirs}", f"{start}:{mine}"))
    assert found(store, talk(300)) == []  # it says of itself that it is another namespace's
    link.call(lambda client: client.hset(f"{start}:{mine}", "namespace", "default"))
    assert found(store, talk(300)) == [(mine, 200)]
    link.call(lambda client: client.hset(PLACES_KEY.format(store=store.catalog.store_id), mine, b"\xff" * 9))
    assert found(store, talk(300)) == []
    link.call(lambda client: client.hset(f"{start}:{mine}", "bytes", "junk"))
    assert found(store, talk(300)) == []
    link.call(lambda client: client.set(SUM_KEY.format(store=store.catalog.store_id), "junk"))
    put(store, talk(500, start=8))
    store.tails.sweep()
    store.tails.index.recount()


def test_the_budget_costs_what_is_longest_unused(store: ArtifactStore) -> None:
    first = put(store, talk(200, start=1))
    size = store.tails.blobs.size(first)
    budget = 3 * size + size // 2
    others = [put(store, talk(200, start=start), budget=budget) for start in (2, 3)]
    store.tails.load(first, FINGERPRINT, "default", WIDE)
    last = put(store, talk(200, start=4), budget=budget)
    assert agree(store) == {first, others[1], last}
    newest = put(store, talk(200, start=5), budget=size + 1)
    assert agree(store) == {newest}


def test_a_namespace_that_writes_much_takes_nothing_from_those_that_write_little(
    store: ArtifactStore,
) -> None:
    quiet = [put(store, talk(200, start=start), "quiet") for start in (1, 2)]
    size = store.tails.blobs.size(quiet[0])
    loud = [put(store, talk(200, start=start), "loud", budget=6 * size + 5) for start in range(20)]
    assert names_of(store, "quiet") == quiet and names_of(store, "loud") == loud[-4:]
    agree(store)


def test_a_namespace_may_have_all_room_until_another_one_comes(store: ArtifactStore) -> None:
    size = store.tails.blobs.size(put(store, talk(200, start=99), "first"))
    budget = 6 * size + 5
    first = [put(store, talk(200, start=start), "first", budget=budget) for start in range(6)]
    assert names_of(store, "first") == first
    store.tails.load(first[0], FINGERPRINT, "first", WIDE)
    second = [put(store, talk(200, start=start), "second", budget=budget) for start in range(5)]
    assert names_of(store, "second") == second[-3:]
    assert names_of(store, "first") == [*first[4:], first[0]], "the longest unused of the one with most go"
    agree(store)


def test_a_tail_that_would_take_from_smaller_namespaces_is_refused(store: ArtifactStore) -> None:
    small = [put(store, talk(100, start=start), f"n{start}") for start in range(3)]
    held = sum(store.tails.blobs.sizes())
    size = store.tails.blobs.size(put(store, talk(2000), "large"))
    with pytest.raises(QuotaExceeded, match="share of namespace 'large'"):
        put(store, talk(2000, start=1), "large", budget=held + size - 1)
    assert set(small) <= agree(store) and shares(store)["large"] == size
    with pytest.raises(QuotaExceeded, match="share of namespace 'other'"):
        put(store, talk(2001, start=1), "other", budget=held + size - 1)
    assert set(small) <= agree(store) and "other" not in shares(store)


@pytest.mark.parametrize("seed", range(3))
def test_no_namespace_within_its_share_ever_loses_a_tail(store: ArtifactStore, seed: int) -> None:
    random, budget = Random(seed), 40_000
    for number in range(60):
        namespace = random.choice("aaaaabbc")
        before = shares(store) | {namespace: 0}
        mine = {one: names_of(store, one) for one in before}
        with suppress(QuotaExceeded):
            put(store, talk(random.randrange(70, 900), start=number), namespace, budget=budget)
        agree(store)
        assert sum(shares(store).values()) <= budget
        for other in set(before) - {namespace}:
            if before[other] <= budget / len(before):
                assert names_of(store, other) == mine[other]


def test_what_redis_lost_of_namespaces_is_counted_again(store: ArtifactStore) -> None:
    names = [put(store, talk(200, start=start), space) for start, space in enumerate(("a", "a", "b"))]
    held, size = shares(store), store.tails.blobs.size(names[0])
    lost = [SHARES_KEY, NAMESPACE_KEY.replace("{namespace}", "a")]
    store.catalog.link.call(lambda client: client.delete(*(key_of(key, store) for key in lost)))
    store.catalog.link.call(lambda client: client.zadd(key_of(SHARES_KEY, store), {"gone": 10**12}))
    store.tails.sweep()
    assert shares(store) == held and names_of(store, "a") == names[:2]
    put(store, talk(200, start=8), "a", budget=3 * size + 5)
    assert names[0] not in agree(store)


def test_a_tail_larger_than_the_budget_costs_no_other(store: ArtifactStore) -> None:
    names = {put(store, talk(200, start=start)) for start in (1, 2)}
    size = store.tails.blobs.size(next(iter(names)))
    with pytest.raises(QuotaExceeded, match="budget for stored tails"):
        put(store, talk(200, start=3), budget=size - 1)
    assert agree(store) == names


def test_what_is_read_is_neither_collected_nor_evicted(store: ArtifactStore) -> None:
    name = put(store, talk(200, start=1), ttl_s=0.2)
    readers = Readers(store.tails.index)
    with readers.hold(name):
        time.sleep(0.3)
        assert store.collect().tails.tails == 0
        put(store, talk(200, start=2), budget=store.tails.blobs.size(name))
        assert name in agree(store)
    collected = store.collect(dry_run=True).tails
    assert collected.tails == 1 and name in agree(store)
    assert store.collect().tails == collected and name not in agree(store)
    with pytest.raises(ArtifactNotFound), readers.hold(name):
        pass


def test_what_has_ended_is_not_found_before_it_is_collected(store: ArtifactStore) -> None:
    name = put(store, talk(200), ttl_s=0.2)
    assert found(store, talk(300)) == [(name, 200)]
    time.sleep(0.3)
    assert found(store, talk(300)) == []
    with pytest.raises(ArtifactNotFound):
        store.tails.load(name, FINGERPRINT, "default", WIDE)


def test_many_that_have_ended_are_collected(store: ArtifactStore) -> None:
    for start in range(40):
        put(store, talk(100, start=start), ttl_s=0.01)
    kept = put(store, talk(100, start=500))
    time.sleep(0.1)
    report = store.collect()
    assert report.tails.tails == 40 and report.removed == () and agree(store) == {kept}
    assert store.tails.usage().bytes == store.tails.blobs.size(kept)


@pytest.mark.parametrize("how", ["lost", "damaged", "of another type"])
def test_entries_that_are_lost_or_damaged_keep_no_blob(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(tail_index, "_PAGE", 2)
    bad = [put(store, talk(200, start=start), ttl_s=0.01) for start in range(4)]
    ended, kept = put(store, talk(200, start=5), ttl_s=0.02), put(store, talk(200, start=6))
    for name in bad:
        damage(store, name, how)
    store.catalog.link.call(lambda client: client.zadd(key_of(EXPIRY_KEY, store), {"no id": 0}))
    time.sleep(0.1)
    size = sum(store.tails.blobs.size(name) for name in [*bad, ended])
    assert store.collect(dry_run=True).tails == TailUsage(5, size)
    assert store.collect().tails == TailUsage(5, size)
    assert set(store.tails.blobs.ids()) == set(store.tails.index.ids()) == {kept}
    assert store.collect().tails == TailUsage(0, 0)


def test_orphans_are_also_those_whose_entry_is_lost(store: ArtifactStore) -> None:
    lost, damaged, kept = (put(store, talk(200, start=start)) for start in (1, 2, 3))
    damage(store, lost, "lost")
    damage(store, damaged, "damaged")
    store.catalog.link.call(lambda client: client.zadd(key_of(USED_KEY, store), {"no id": 0}))
    then = time.time() - UNLISTED_S - 1
    for name in (lost, damaged, kept):
        os.utime(Path(store.blobs.url) / "tails" / name[:2] / f"{name}.xkv", (then, then))
    assert store.collect_orphans().tails == 2
    assert agree(store) == {kept}


def damage(store: ArtifactStore, name: str, how: str) -> None:
    key, link = ENTRY_KEY.format(store=store.catalog.store_id, id=name), store.catalog.link
    if how == "damaged":
        link.call(lambda client: client.hset(key, "tokens", "junk"))
        return
    link.call(lambda client: client.delete(key))
    if how == "of another type":
        link.call(lambda client: client.set(key, "junk"))


def key_of(key: str, store: ArtifactStore) -> str:
    return key.format(store=store.catalog.store_id)


@pytest.mark.parametrize("offset", [3, 60, -5])
def test_a_damaged_blob_is_deleted(store: ArtifactStore, offset: int) -> None:
    name = put(store, talk(200))
    path = Path(store.blobs.url) / "tails" / name[:2] / f"{name}.xkv"
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match="deleted"):
        store.tails.load(name, FINGERPRINT, "default", WIDE)
    assert agree(store) == set() and found(store, talk(300)) == []
    assert not (Path(store.blobs.url) / "quarantine").exists()


def test_a_blob_that_is_gone_or_too_large_is_not_read(store: ArtifactStore) -> None:
    name = put(store, talk(200))
    with pytest.raises(ForeignTail, match="larger"):
        store.tails.load(name, FINGERPRINT, "default", 100)
    store.tails.blobs.remove(name)
    with pytest.raises(ArtifactNotFound):
        store.tails.load(name, FINGERPRINT, "default", WIDE)
    assert agree(store) == set()


def test_orphans_go_when_nobody_can_be_about_to_list_them(store: ArtifactStore) -> None:
    old, young, gone = (put(store, talk(200, start=start)) for start in (1, 2, 3))
    link = store.catalog.link
    names = keys(store)
    link.call(lambda client: client.delete(*names))  # a Redis that was emptied
    folder = Path(store.blobs.url) / "tails"
    for name in (old, gone):
        then = time.time() - UNLISTED_S - 1
        os.utime(folder / name[:2] / f"{name}.xkv", (then, then))
    listed = put(store, talk(200, start=3))
    assert listed == "" or listed == gone  # written anew, since nobody knows it
    assert store.collect_orphans().tails == 1
    assert set(store.tails.blobs.ids()) == {young, gone}
    store.tails.blobs.remove(gone)
    store.collect_orphans()
    assert store.tails.index.ids() == []


def test_nothing_is_left_in_redis_of_tails_that_are_gone(store: ArtifactStore) -> None:
    for start in range(5):
        put(store, talk(300, start=start), ttl_s=0.01)
    time.sleep(0.1)
    store.collect()
    kinds = {name.decode().rsplit(":", 3)[-1] for name in keys(store)}
    left = [name for name in keys(store) if not name.endswith((b"tail-bytes", b":default"))]
    assert left == [] and len(kinds) <= 2, keys(store)


def test_rebuilding_the_index_leaves_tails(store: ArtifactStore) -> None:
    name = put(store, talk(200))
    store.rebuild()
    assert found(store, talk(300)) == [(name, 200)] and agree(store) == {name}
    assert list(store.verify()) == [] and store.entries() == []


def test_without_redis_nothing_is_stored(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "s"), own_redis.url, patience_s=0.1) as store:
        name = put(store, talk(200))
        own_redis.kill()
        began = time.monotonic()
        with pytest.raises(CatalogUnavailable):
            put(store, talk(300))
        with pytest.raises(CatalogUnavailable):
            found(store, talk(300))
        assert time.monotonic() - began < 5
        assert list(store.tails.blobs.ids()) == [name]
        store.tails.load(name, FINGERPRINT, "default", WIDE)  # no collector runs without Redis either


def test_many_writers_keep_the_budget(store: ArtifactStore) -> None:
    size = store.tails.blobs.size(put(store, talk(200)))
    faults: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for start in range(8):
                put_quietly(store, talk(200, start=10 * start + number), 5 * size)
        except BaseException as error:  # noqa: BLE001 - told to the test
            faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and 3 <= len(agree(store)) <= 5


def put_quietly(store: ArtifactStore, ids: list[int], budget: int) -> None:
    put(store, ids, budget=budget)


def test_the_order_is_that_of_use(store: ArtifactStore) -> None:
    names = [put(store, talk(200, start=start)) for start in (1, 2, 3)]
    assert store.tails.index.touch(names[0]) and not store.tails.index.touch("0" * 64)
    used = store.catalog.link.call(
        lambda client: client.zrange(USED_KEY.format(store=store.catalog.store_id), 0, -1)
    )
    assert [name.decode() for name in used] == [names[1], names[2], names[0]]


def test_tails_in_a_bucket(bucket: str, redis_server: RedisServer) -> None:
    with ArtifactStore.open(f"s3://{bucket}/store", redis_server.url) as store:
        name, other = put(store, talk(200)), put(store, talk(200, start=1), ttl_s=0.2)
        assert found(store, talk(300)) == [(name, 200)]
        manifest, tensors = store.tails.load(name, FINGERPRINT, "default", WIDE)
        assert manifest.tokens == 200 and tensors["tokens"].tolist() == talk(200)
        time.sleep(0.3)
        assert store.collect().tails.tails == 1 and agree(store) == {name} != {other}
        names = keys(store)
        store.catalog.link.call(lambda client: client.delete(*names))
        assert store.collect_orphans().tails == 0  # too young
        assert store.tails.usage().tails == 1
