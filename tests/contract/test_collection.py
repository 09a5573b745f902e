"""Collecting in a real store: what ends and what is beyond the limits goes, and nothing else, ever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import sample
from calibration_samples import calibration
from click.testing import CliRunner
from redis_server import RedisServer
from renewal import RENEWED_S, wait_for_renewal

from xkv_artifacts.catalog import ENTRY_KEY, EXPIRY_KEY, READERS_KEY, RECENCY_KEY
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    InvalidLimits,
    QuotaExceeded,
)
from xkv_artifacts.limits import Limits, Quota
from xkv_artifacts.namespace_index import NAMESPACE_KEY, SUMS_KEY
from xkv_artifacts.readers import Readers
from xkv_artifacts.reports import Excess
from xkv_artifacts.store import ArtifactStore
from xkv_cli.main import xkv


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def publish(store: ArtifactStore, length: int, namespace: str = "default", **promised: object) -> str:
    return store.publish(*sample(range(length), namespace=namespace), **promised).id  # type: ignore[arg-type]


def stored(store: ArtifactStore) -> set[str]:
    """Ids of the blobs, which the catalog has to agree with."""
    blobs = set(store.blobs.ids())
    assert {entry.id for entry in store.entries()} == blobs
    return blobs


def sizes(store: ArtifactStore, ids: Sequence[str]) -> list[int]:
    return [store.blobs.size(artifact_id) for artifact_id in ids]


def limit(store: ArtifactStore, **limits: object) -> None:
    (Path(store.blobs.url) / "limits.json").write_text(json.dumps(limits))


def marked_until(store: ArtifactStore, artifact_id: str) -> float | None:
    """When the last mark of those who read a blob runs out."""
    key = READERS_KEY.format(store=store.catalog.store_id, id=artifact_id)
    marks = store.catalog.link.call(lambda client: client.zrange(key, -1, -1, withscores=True))
    return marks[0][1] if marks else None


def test_nothing_is_collected_without_a_reason(store: ArtifactStore) -> None:
    ids = {publish(store, length) for length in (10, 20)}
    report = store.collect()
    assert (report.removed, report.in_use, report.excess) == ((), 0, ())
    assert report.stored == sum(sizes(store, sorted(ids))) and stored(store) == ids


def test_a_budget_costs_what_is_longest_unused_and_nothing_pinned(store: ArtifactStore) -> None:
    ids = [publish(store, length) for length in range(10, 60, 10)]
    store.pin(ids[1])
    store.load(ids[0])
    size = sizes(store, ids)
    report = store.collect(Limits(budget=size[0] + size[1] + size[4]))
    assert [(removal.artifact_id, removal.reason) for removal in report.removed] == [
        (ids[2], "budget"),
        (ids[3], "budget"),
    ]
    assert report.bytes == size[2] + size[3] and report.excess == ()
    assert stored(store) == {ids[0], ids[1], ids[4]}
    assert store.collect(Limits(budget=size[0] + size[1] + size[4])).removed == ()


def test_what_has_ended_goes_first(store: ArtifactStore) -> None:
    old, ended = publish(store, 10), publish(store, 90, ttl_s=0.2)
    time.sleep(0.3)
    report = store.collect(Limits(budget=store.blobs.size(old)))
    assert [removal.reason for removal in report.removed] == ["expired"]
    assert stored(store) == {old} and ended != old


def test_a_dry_run_says_what_a_real_one_does_then(store: ArtifactStore) -> None:
    ids = [publish(store, length) for length in range(10, 60, 10)]
    store.set_ttl(ids[3], 0.2)
    other = publish(store, 33, "acme")
    store.pin(ids[0])
    time.sleep(0.3)
    size = sizes(store, ids)
    limits = Limits(budget=size[0] + size[4], namespaces={"default": Quota(artifacts=3)})
    said = store.collect(limits, dry_run=True)
    assert stored(store) == {*ids, other}
    done = store.collect(limits)
    assert said.removed == done.removed and said.stored == done.stored and said.dry_run
    assert [removal.reason for removal in done.removed] == ["expired", "quota", "budget", "budget"]
    assert stored(store) == {ids[0], other}


def test_quotas_are_each_namespaces_own(store: ArtifactStore) -> None:
    mine = [publish(store, length) for length in (10, 20, 30)]
    theirs = [publish(store, length, "acme") for length in (10, 20, 30)]
    size = sizes(store, theirs)
    limits = Limits(each=Quota(artifacts=3), namespaces={"acme": Quota(bytes=size[2])})
    report = store.collect(limits)
    assert [(removal.artifact_id, removal.namespace) for removal in report.removed] == [
        (theirs[0], "acme"),
        (theirs[1], "acme"),
    ]
    assert stored(store) == {*mine, theirs[2]}


def test_pins_that_exceed_a_limit_are_told(store: ArtifactStore) -> None:
    ids = [publish(store, length, pinned=True) for length in (10, 20)]
    size = sum(sizes(store, ids))
    report = store.collect(Limits(budget=100, each=Quota(artifacts=1)))
    assert report.removed == () and stored(store) == set(ids)
    assert report.excess == (Excess("default", 0, 1, size), Excess(None, size - 100, 0, size))


def test_calibrations_that_exceed_a_budget_are_told(store: ArtifactStore) -> None:
    made = store.calibrations.publish(*calibration()).id
    size = store.calibrations.blobs.size(made)
    report = store.collect(Limits(budget=100))
    assert report.excess == (Excess(None, size - 100, 0, 0, size),)
    assert store.calibrations.ids() == [made]


@pytest.mark.parametrize("kept", ["calibration", "pin"])
def test_the_command_deletes_nothing_for_a_budget_that_cannot_be_kept(
    store: ArtifactStore, kept: str
) -> None:
    ids = [publish(store, length) for length in (10, 20)]
    ended = publish(store, 30, ttl_s=0.1)
    if kept == "pin":
        held = store.blobs.size(publish(store, 40, pinned=True))
    else:
        held = store.calibrations.blobs.size(store.calibrations.publish(*calibration()).id)
    own = sum(sizes(store, ids))
    time.sleep(0.2)
    arguments = ["--store", store.blobs.url, "--redis", store.redis_url]
    for options in (["--dry-run"], []):
        result = CliRunner().invoke(xkv, ["gc", "--budget", str(held - 1), *options, "--json", *arguments])
        found = json.loads(result.output)
        assert [removal["id"] for removal in found["artifacts"]] == [ended]
        assert [(one["bytes"], one["untouched"]) for one in found["excess"]] == [(own + 1, True)]
    assert set(ids) <= stored(store)
    result = CliRunner().invoke(xkv, ["gc", "--budget", str(held), "--json", *arguments])
    assert sorted(removal["id"] for removal in json.loads(result.output)["artifacts"]) == sorted(ids)


def test_a_server_comes_as_near_to_a_budget_as_it_can(store: ArtifactStore) -> None:
    plain, pinned = publish(store, 10), publish(store, 40, pinned=True)
    report = store.collect(Limits(budget=100))
    assert [removal.artifact_id for removal in report.removed] == [plain] and stored(store) == {pinned}
    assert [excess.untouched for excess in report.excess] == [False]


def test_what_is_read_stays_until_it_is_read(store: ArtifactStore) -> None:
    ids = [publish(store, length) for length in (10, 20)]
    with store.reading(ids[0]), store.reading(ids[0]):
        report = store.collect(Limits(budget=0))
        assert report.in_use == 1 and stored(store) == {ids[0]}
        store.load(ids[0])  # a read that ends leaves the others' marks
        assert store.collect(Limits(budget=0)).in_use == 1
        store.set_ttl(ids[0], 0.1)
        time.sleep(0.2)
        assert store.collect().in_use == 1
    assert [removal.artifact_id for removal in store.collect().removed] == [ids[0]]


def test_marks_are_renewed_and_those_of_the_dead_run_out(store: ArtifactStore) -> None:
    ids = [publish(store, length) for length in (10, 20)]
    readers = Readers(store.catalog, mark_s=RENEWED_S)
    store.catalog.mark_read(ids[1], "somebody who died", 600)
    with readers.hold(ids[0]):
        assert store.collect(Limits(budget=0)).in_use == 2
        wait_for_renewal(lambda: marked_until(store, ids[0]))
        store.catalog.mark_read(ids[1], "somebody who died", 0.1)
        time.sleep(0.2)
        report = store.collect(Limits(budget=0))
        assert report.in_use == 1 and [removal.artifact_id for removal in report.removed] == [ids[1]]
    assert len(store.collect(Limits(budget=0)).removed) == 1
    names = store.catalog.link.call(lambda client: client.keys(f"xkv:1:{store.catalog.store_id}:readers:*"))
    assert names == []


def test_what_is_computed_stays(store: ArtifactStore) -> None:
    artifact_id = publish(store, 10)
    lease = store.catalog.lease(artifact_id, "worker")
    assert lease is not None
    with lease:
        assert store.collect(Limits(budget=0)).in_use == 1
        assert store.catalog.lease_owner(artifact_id) == "worker"
    assert len(store.collect(Limits(budget=0)).removed) == 1
    assert store.catalog.lease_owner(artifact_id) is None  # whoever wants to compute it again can


def test_collectors_at_once_delete_no_more_than_one_would(store: ArtifactStore) -> None:
    ids = [publish(store, length) for length in range(10, 50)]
    size = sizes(store, ids)
    limits = Limits(budget=sum(size[20:]))
    reports, faults = [], []

    def work() -> None:
        try:
            with ArtifactStore.open(store.blobs.url, store.redis_url) as own:
                reports.append(own.collect(limits))
        except Exception as error:  # noqa: BLE001 - the test's own thread hands it on
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    removed = [removal.artifact_id for report in reports for removal in report.removed]
    assert sorted(removed) == sorted(ids[:20])
    assert stored(store) == set(ids[20:])


def test_readers_and_collectors_at_once(store: ArtifactStore) -> None:
    """Each load gives the whole artifact or says that it is gone; nothing in between."""
    ids = [publish(store, length) for length in range(10, 40)]
    done = threading.Event()
    faults: list[Exception] = []
    loads = [0]

    def read(place: int) -> None:
        with ArtifactStore.open(store.blobs.url, store.redis_url) as own:
            while not done.is_set():
                for length in range(10 + place, 40, 3):
                    try:
                        manifest, tensors = own.load(ids[length - 10])
                        assert manifest.tokens == len(tensors["tokens"]) == length
                        loads[0] += 1
                    except ArtifactNotFound:
                        continue
                    except Exception as error:  # noqa: BLE001 - the test's own thread hands it on
                        faults.append(error)

    threads = [threading.Thread(target=read, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for number in range(12):
        store.collect(Limits(budget=sum(sizes(store, sorted(stored(store)))) * 2 // 3))
        for length in range(10 + number % 3, 40, 3):
            publish(store, length)
    deadline = time.monotonic() + 120
    while loads[0] <= 20 and time.monotonic() < deadline:
        publish(store, 10)
    done.set()
    for thread in threads:
        thread.join()
    assert faults == [] and loads[0] > 20
    assert all(check.fault is None for check in store.verify())
    stored(store)


def test_without_redis_nothing_is_deleted_and_all_is_read(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "s"), own_redis.url, patience_s=0.2) as store:
        ids = [publish(store, length) for length in (10, 20)]
        with store.reading(ids[0]):
            own_redis.kill()
            with pytest.raises(CatalogUnavailable):
                store.collect(Limits(budget=0))
            assert [store.load(artifact_id)[0].tokens for artifact_id in ids] == [10, 20]
            own_redis.start()
        store.rebuild()
        assert len(store.collect(Limits(budget=0)).removed) == 2


def test_a_mark_that_redis_lost_is_set_again(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "s"), own_redis.url) as store:
        artifact_id = publish(store, 10)
        with Readers(store.catalog, mark_s=RENEWED_S).hold(artifact_id):
            own_redis.kill()
            own_redis.start()
            store.rebuild()
            wait_for_renewal(lambda: marked_until(store, artifact_id))
            assert store.collect(Limits(budget=0)).in_use == 1


def test_publishing_over_a_quota_collects_in_that_namespace_alone(store: ArtifactStore) -> None:
    others = publish(store, 10, "acme")
    ids = [publish(store, length) for length in (50, 60)]
    limit(store, each={"bytes": sum(sizes(store, ids)) + 100})
    third = publish(store, 40)
    assert stored(store) == {others, ids[1], third}
    limit(store, each={"artifacts": 2})
    fourth = publish(store, 20)
    assert stored(store) == {others, third, fourth}
    assert publish(store, 20) == fourth and stored(store) == {others, third, fourth}  # takes no more room


def test_what_is_replaced_makes_room_for_itself(store: ArtifactStore) -> None:
    first, second, third = (publish(store, length) for length in (50, 20, 30))
    store.pin(third)
    limit(store, each={"bytes": sum(sizes(store, [first, third])) + 50, "artifacts": 3})
    assert publish(store, 50) == first  # the longest unused, but not for its own sake
    assert stored(store) == {first, third}
    assert publish(store, 30) == third and stored(store) == {first, third}
    limit(store, each={"artifacts": 1})
    assert publish(store, 30) == third and stored(store) == {third}
    assert second not in stored(store)


def test_what_cannot_fit_is_refused_and_costs_nothing(store: ArtifactStore) -> None:
    pinned, plain = publish(store, 50, pinned=True), publish(store, 20)
    limit(store, namespaces={"default": {"bytes": store.blobs.size(pinned) + 100}})
    with pytest.raises(QuotaExceeded, match=r"namespace default may hold .* bytes: .* pinned") as caught:
        publish(store, 51)
    assert "limits.json" in caught.value.hint
    assert stored(store) == {pinned, plain}  # plain would not have helped
    limit(store, namespaces={"default": {"artifacts": 0}})
    with pytest.raises(QuotaExceeded, match="0 artifacts"):
        publish(store, 51, pinned=True)
    assert stored(store) == {pinned, plain}
    assert len(list((Path(store.blobs.url) / "retention").rglob("*.json"))) == 1


def test_workers_that_publish_at_once_never_exceed_a_quota(store: ArtifactStore) -> None:
    limit(store, each={"artifacts": 5})
    most = [0]
    done = threading.Event()
    faults: list[Exception] = []

    def publish_some(place: int) -> None:
        try:
            with ArtifactStore.open(store.blobs.url, store.redis_url) as own:
                for length in range(10 + place, 60, 4):
                    publish(own, length)
        except Exception as error:  # noqa: BLE001 - the test's own thread hands it on
            faults.append(error)

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], store.catalog.namespaces.usage("default").artifacts)

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=publish_some, args=(place,)) for place in range(4)]
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert faults == [] and most[0] == 5 and len(stored(store)) == 5


def test_a_blob_that_is_too_large_with_its_header_leaves_nothing(store: ArtifactStore) -> None:
    manifest, tensors = sample(range(50))
    payload = sum(tensor.nbytes for tensor in tensors.values())
    limit(store, each={"bytes": payload + 10})
    with pytest.raises(QuotaExceeded):
        store.publish(manifest, tensors, pinned=True)
    assert stored(store) == set() and not list((Path(store.blobs.url) / "retention").rglob("*.json"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "the file"),
        ('{"budjet": 1}', "budjet"),
        ('{"budget": -1}', "budget"),
        ('{"budget": 1.5}', "budget"),
        ('{"budget": "many"}', "budget"),
        ('{"budget": 1e400}', "budget"),
        ('{"each": {"bytes": "5 parsecs"}}', "each.bytes"),
        ('{"namespaces": {"../x": {}}}', "namespaces"),
        ('{"namespaces": {"a": {"artifacts": true}}}', "namespaces.a.artifacts"),
    ],
)
def test_limits_that_are_none_are_named(store: ArtifactStore, content: str, named: str) -> None:
    (Path(store.blobs.url) / "limits.json").write_text(content)
    for action in (store.collect, lambda: publish(store, 10)):
        with pytest.raises(InvalidLimits, match=named) as caught:
            action()
        assert "\n" not in caught.value.message
    assert stored(store) == set()


Spoil = Callable[[Any, dict[str, str], list[str]], object]
HOSTILE: dict[str, Spoil] = {
    "all have ended": lambda r, key, ids: r.zadd(key["expiry"], dict.fromkeys(ids, 1.0)),
    "all ended at minus infinity": lambda r, key, ids: r.zadd(key["expiry"], dict.fromkeys(ids, "-inf")),
    "junk has ended": lambda r, key, ids: r.zadd(key["expiry"], {"../../x": 1, b"\xff": 2, "0" * 64: 3}),
    "nothing is pinned": lambda r, key, ids: [r.hset(key["entry"] + i, "pinned", "False") for i in ids],
    "pins are junk": lambda r, key, ids: [r.hset(key["entry"] + i, "pinned", "perhaps") for i in ids],
    "huge sums": lambda r, key, ids: [r.hset(key["sums"], name, 10**17) for name in ("default", "*")],
    "huge artifacts": lambda r, key, ids: [r.hset(key["entry"] + i, "bytes", 10**14) for i in ids],
    "tiny artifacts": lambda r, key, ids: [r.hset(key["entry"] + i, "bytes", 1) for i in ids],
    "lost entries": lambda r, key, ids: [r.delete(key["entry"] + i) for i in ids],
    "wrong types": lambda r, key, ids: [
        (r.delete(key["entry"] + i), r.set(key["entry"] + i, 1)) for i in ids
    ],
    "last used never": lambda r, key, ids: r.zadd(key["recency"], dict.fromkeys(ids, "-inf")),
    "last used at the end of time": lambda r, key, ids: r.zadd(key["recency"], dict.fromkeys(ids, "inf")),
    "strange ids": lambda r, key, ids: r.zadd(key["recency"], {"../../x": -1, b"\xff": -2, "": -3}),
    "another namespace's": lambda r, key, ids: r.zadd(key["namespace"], {"1" * 64: 1, "../x": 0}),
}


@pytest.mark.parametrize("spoil", HOSTILE)
def test_a_lying_catalog_costs_nothing_pinned_and_no_more_than_the_budget(
    store: ArtifactStore, spoil: str
) -> None:
    ids = [publish(store, length) for length in (20, 21, 22, 23)]
    store.pin(ids[0])
    store.set_ttl(ids[1], 3600)
    name = {"store": store.catalog.store_id, "id": "", "namespace": "default"}
    keys = {
        "entry": ENTRY_KEY.format(**name),
        "recency": RECENCY_KEY.format(**name),
        "expiry": EXPIRY_KEY.format(**name),
        "sums": SUMS_KEY.format(**name),
        "namespace": NAMESPACE_KEY.format(**name),
    }
    store.catalog.link.call(lambda client: HOSTILE[spoil](client, keys, ids))
    size = sizes(store, ids)
    assert store.collect().removed == ()
    report = store.collect(Limits(budget=sum(size[1:])))
    assert set(store.blobs.ids()) >= {ids[0]} and len(report.removed) <= 1
    assert len(list(store.blobs.ids())) >= 3
    store.rebuild()
    assert store.entries()[0].bytes and {entry.pinned for entry in store.entries() if entry.id == ids[0]} == {
        True
    }


@pytest.mark.parametrize("junk", ["many", "1e5", "nan", "9" * 30, ""])
def test_sums_that_are_no_number_are_one_clear_error_until_rebuilt(store: ArtifactStore, junk: str) -> None:
    artifact_id = publish(store, 10)
    key = SUMS_KEY.format(store=store.catalog.store_id)
    store.catalog.link.call(lambda client: [client.hset(key, name, junk) for name in ("default", "*")])
    with pytest.raises(CatalogError) as caught:
        store.collect(Limits(budget=1))
    assert "rebuild" in caught.value.hint
    store.rebuild()
    assert store.collect(Limits(budget=10**9)).stored == store.blobs.size(artifact_id)


def test_sums_that_drifted_are_counted_again(store: ArtifactStore) -> None:
    ids = [publish(store, length) for length in (10, 20)]
    key = SUMS_KEY.format(store=store.catalog.store_id)
    for action in (
        lambda: store.collect(Limits(budget=10**7)),
        store.collect_orphans,
        lambda: store.usage("default"),
    ):
        store.catalog.link.call(lambda client: client.hset(key, "default", 10**12))
        store.catalog.link.call(lambda client: client.hset(key, "*", 10**12))
        action()
        assert store.catalog.namespaces.usage("default").bytes == sum(sizes(store, ids))
    assert stored(store) == set(ids)


@pytest.mark.parametrize("drop", ["entry", "blob"])
def test_a_collector_that_died_halfway_is_cleaned_up_after(store: ArtifactStore, drop: str) -> None:
    """The two states in which `kill -9` can leave an artifact; the third, a lone retention file, is below."""
    artifact_id, other = publish(store, 10, ttl_s=0.1), publish(store, 20)
    time.sleep(0.2)
    if drop == "entry":
        store.catalog.drop(artifact_id)
    else:
        store.blobs.remove(artifact_id)
    store.collect_orphans()
    assert stored(store) == ({other} if drop == "blob" else {artifact_id, other})
    assert [removal.artifact_id for removal in store.collect().removed] == (
        [] if drop == "blob" else [artifact_id]
    )
    assert stored(store) == {other}
    assert not list((Path(store.blobs.url) / "retention").rglob("*.json"))
