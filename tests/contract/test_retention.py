"""Pins and times to live: kept through a lost Redis, obeyed by lookups, changed by one at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifact_samples import FINGERPRINT, sample
from redis_server import RedisServer

from xkv_artifacts.errors import ArtifactNotFound, InvalidLimits, StoreError
from xkv_artifacts.retention import Retention
from xkv_artifacts.store import ArtifactStore, Match


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def publish(store: ArtifactStore, length: int = 100, **promised: object) -> str:
    return store.publish(*sample(range(length)), **promised).id  # type: ignore[arg-type]


def file_of(store: ArtifactStore, artifact_id: str) -> Path:
    return Path(store.blobs.url) / "retention" / artifact_id[:2] / f"{artifact_id}.json"


def test_a_promise_is_a_file_beside_the_blob_and_in_the_entry(store: ArtifactStore) -> None:
    plain, kept = publish(store, 10), publish(store, 20)
    assert store.pin(kept) == Retention(pinned=True)
    before = store.catalog.now()
    promised = store.set_ttl(kept, 3600)
    assert promised.expires is not None and before + 3600 <= promised.expires <= store.catalog.now() + 3600
    assert json.loads(file_of(store, kept).read_text()) == {
        "format": "xkv-retention",
        "version": 1,
        "pinned": True,
        "expires": promised.expires,
    }
    entries = {entry.id: (entry.pinned, entry.expires) for entry in store.entries()}
    assert entries == {plain: (False, None), kept: (True, promised.expires)}
    store.unpin(kept)
    store.set_ttl(kept, None)
    assert not file_of(store, kept).exists() and not file_of(store, plain).exists()
    assert [(entry.pinned, entry.expires) for entry in store.entries()] == [(False, None)] * 2


def test_promises_outlive_the_catalog(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "store"), own_redis.url) as store:
        pinned, ending, plain = (publish(store, length) for length in (10, 20, 30))
        store.pin(pinned)
        ends = store.set_ttl(ending, 3600).expires
        expected = {pinned: (True, None), ending: (False, ends), plain: (False, None)}
        own_redis.kill()
        own_redis.start()
        assert store.entries() == []
        store.rebuild()
        assert {entry.id: (entry.pinned, entry.expires) for entry in store.entries()} == expected
        own_redis.kill()
        own_redis.start()
        found = [store.get(artifact_id) for artifact_id in expected]  # each is listed when it is asked for
        assert {entry.id: (entry.pinned, entry.expires) for entry in found if entry} == expected
        own_redis.kill()
        own_redis.start()
        store.collect_orphans()
        assert {entry.id: (entry.pinned, entry.expires) for entry in store.entries()} == expected


def test_what_has_ended_is_not_found_before_it_is_collected(store: ArtifactStore) -> None:
    short, long = publish(store, 50), publish(store, 100, ttl_s=600)
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(long, 100)
    store.load(long)
    store.set_ttl(long, 0.1)
    time.sleep(0.2)
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(short, 50)
    assert store.get(long) is None
    assert [entry.id for entry in store.page("default")[0]] == [short]
    for action in (store.load, store.pin, store.unpin, lambda ended: store.set_ttl(ended, 60)):
        with pytest.raises(ArtifactNotFound, match=long):
            action(long)
    assert store.blobs.exists(long)
    assert [removal.artifact_id for removal in store.collect().removed] == [long]
    assert not store.blobs.exists(long) and not file_of(store, long).exists()


def test_a_pinned_artifact_does_not_end_until_it_is_unpinned(store: ArtifactStore) -> None:
    artifact_id = publish(store, 100, ttl_s=0.3, pinned=True)
    time.sleep(0.4)
    assert store.collect().removed == ()
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(artifact_id, 100)
    store.load(artifact_id)
    store.unpin(artifact_id)
    assert store.lookup(FINGERPRINT, "default", range(100)) is None
    assert [removal.reason for removal in store.collect().removed] == ["expired"]


def test_use_does_not_prolong_a_life_but_setting_it_again_does(store: ArtifactStore) -> None:
    used, renewed, ended = (publish(store, length, ttl_s=600) for length in (10, 20, 30))
    before = {entry.id: entry.expires or 0.0 for entry in store.entries()}
    store.load(used)
    store.set_ttl(renewed, 6000)
    after = {entry.id: entry.expires or 0.0 for entry in store.entries()}
    assert after[used] == before[used] and after[renewed] > before[renewed] + 5000
    store.set_ttl(ended, 0.1)
    time.sleep(0.2)
    assert [removal.artifact_id for removal in store.collect().removed] == [ended]


def test_publishing_again_keeps_what_was_promised_but_not_an_earlier_end(store: ArtifactStore) -> None:
    pinned, ending, ended = publish(store, 10), publish(store, 20), publish(store, 30, ttl_s=0.2)
    store.pin(pinned)
    ends = store.set_ttl(ending, 60).expires
    time.sleep(0.3)
    for length in (10, 20, 30):
        publish(store, length)
    entries = {entry.id: (entry.pinned, entry.expires) for entry in store.entries()}
    assert entries == {pinned: (True, None), ending: (False, ends), ended: (False, None)}
    assert not file_of(store, ended).exists()
    assert store.collect().removed == ()


def test_a_pin_survives_a_blob_that_was_bad(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    store.pin(artifact_id)
    path = Path(store.blobs.url) / "prefixes" / artifact_id[:2] / f"{artifact_id}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="quarantine"):
        store.load(artifact_id)
    store.collect_orphans()
    publish(store)
    assert store.entries()[0].pinned


def test_removing_an_artifact_forgets_what_was_promised(store: ArtifactStore) -> None:
    artifact_id = publish(store, pinned=True)
    assert store.remove(artifact_id)
    assert not file_of(store, artifact_id).exists()
    publish(store)
    assert not store.entries()[0].pinned


@pytest.mark.parametrize(
    "content", [b"", b"x", b'{"pinned": 1e999}', b'{"version": 2}', b"\xff" * 9000, b"[]"]
)
def test_a_file_that_cannot_be_read_counts_as_a_pin(store: ArtifactStore, content: bytes) -> None:
    artifact_id = publish(store, ttl_s=0.1)
    file_of(store, artifact_id).write_bytes(content)
    time.sleep(0.2)
    assert store.collect().removed == ()
    store.collect_orphans()
    store.rebuild()
    assert store.entries()[0].pinned
    store.unpin(artifact_id)
    assert not file_of(store, artifact_id).exists()


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_time_that_is_none_changes_nothing(store: ArtifactStore, ttl_s: float) -> None:
    artifact_id = publish(store)
    with pytest.raises(InvalidLimits, match="time to live"):
        store.set_ttl(artifact_id, ttl_s)
    with pytest.raises(InvalidLimits):
        publish(store, 20, ttl_s=ttl_s)
    assert [(entry.id, entry.expires) for entry in store.entries()] == [(artifact_id, None)]
    assert not file_of(store, artifact_id).exists() and len(list(store.blobs.ids())) == 1


def test_a_publication_that_fails_promises_nothing(store: ArtifactStore) -> None:
    manifest, tensors = sample()
    with pytest.raises(Exception, match="id"):
        store.publish(manifest.model_copy(update={"id": "0" * 64}), tensors, pinned=True, ttl_s=5)
    assert not file_of(store, "0" * 64).exists()


def test_a_promise_that_cannot_be_written_is_not_in_the_catalog_either(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    (Path(store.blobs.url) / "retention").write_text("in the way")
    with pytest.raises(StoreError):
        store.pin(artifact_id)
    assert not store.entries()[0].pinned


def test_many_changes_at_once_lose_none(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    faults: list[Exception] = []

    def work(number: int) -> None:
        try:
            store.pin(artifact_id) if number % 2 else store.set_ttl(artifact_id, 1000.0 + number)
        except Exception as error:  # noqa: BLE001 - the test's own thread hands it on
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (entry,) = store.entries()
    stored = Retention.model_validate_json(file_of(store, artifact_id).read_bytes())
    assert faults == [] and stored.pinned and stored.expires is not None
    assert (entry.pinned, entry.expires) == (stored.pinned, stored.expires)


def test_what_is_not_there_cannot_be_promised(store: ArtifactStore) -> None:
    for change in (store.pin, store.unpin, lambda gone: store.set_ttl(gone, 5)):
        for artifact_id in ("0" * 64, "../../etc/passwd"):
            with pytest.raises(ArtifactNotFound):
                change(artifact_id)


def test_times_are_those_of_redis_whatever_this_machine_thinks(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    for shift in (-86_400.0, 86_400.0):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        ending = publish(store, 10, ttl_s=30)
        other = publish(store, 20)
        store.load(ending)
        assert [entry.id for entry in store.entries()] == [ending, other]
        assert abs(store.entries()[0].last_used - real()) < 5
        assert store.collect().removed == () and store.get(ending) is not None
        store.remove(ending)
        store.remove(other)
