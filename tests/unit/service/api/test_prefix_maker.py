"""Prefixes that wait to be made: seen through every process, ended with the one that makes them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_samples import sample
from engines import paced_backend
from redis_server import RedisServer
from rivers import DOCUMENT, SETTINGS
from serving import serve

from xkv_artifacts import jobs
from xkv_artifacts.errors import CatalogUnavailable, QuotaExceeded
from xkv_artifacts.jobs import STOPPED
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.store import ArtifactStore
from xkv_service.api import prefix_maker
from xkv_service.api.app import create_app
from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixRecord
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.prefix_records import PrefixRecords
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.errors import CacheMisuse, Overloaded
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.shared_weights import sharing_weights
from xkv_service.spec import CompressionSpec


class Gate(threading.Event):
    """Nothing is compressed before it is set; `reached` is set when something is to be."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch) -> Gate:
    event = Gate()
    compress = prefix_maker.compress

    def held(*arguments: Any) -> Any:
        event.reached.set()
        assert event.wait(300)
        return compress(*arguments)

    monkeypatch.setattr(prefix_maker, "compress", held)
    return event


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


Open = Callable[[], ArtifactStore]


@pytest.fixture
def opened(tmp_path: Path, redis: RedisServer) -> Iterator[Open]:
    """Opens the store once more, as another process does."""
    stores: list[ArtifactStore] = []

    def again() -> ArtifactStore:
        stores.append(ArtifactStore.open(str(tmp_path / "store"), redis.url, patience_s=0))
        return stores[-1]

    yield again
    for store in stores:
        store.close()


def new(number: int, **promised: Any) -> NewPrefix:
    return NewPrefix("a", [5 + number, *range(10, 150)], str(number), "0" * 64, **promised)


def seen(records: PrefixRecords, prefix_id: str, *statuses: str) -> PrefixRecord:
    """The prefix, once it has one of these statuses."""
    end = time.monotonic() + 240
    while (record := records.get(["a"], prefix_id)) is None or record.status not in statuses:
        assert time.monotonic() < end, record
        time.sleep(0.02)
    return record


def test_jobs_wait_their_turn_and_too_many_are_refused(
    opened: Open, loaded: LoadedModel, going: Gate
) -> None:
    store, elsewhere = opened(), PrefixRecords(opened())
    maker = PrefixMaker(store, loaded, ratio=2.0, most_waiting=8)

    def create(prefix: NewPrefix) -> PrefixRecord:
        return asyncio.run(maker.create(prefix))

    try:
        first = create(new(0))
        seen(elsewhere, first.id, "running")
        waiting = [create(new(number)) for number in (1, 2)]
        assert [record.status for record in waiting] == ["queued", "queued"]
        with pytest.raises(Overloaded, match="2 prefixes of namespace a wait"):
            create(new(3))
        assert create(new(1)) == waiting[0]
        assert elsewhere.page("a", None, 10).records == [*waiting[::-1], seen(elsewhere, first.id, "running")]
        changed = elsewhere.change(["a"], waiting[1].id, PrefixChanges(pinned=True, ttl_s=60))
        assert changed is not None and changed.pinned and changed.status == "queued"
        assert not elsewhere.delete(["b"], waiting[0].id)
        assert elsewhere.delete(["a"], waiting[0].id)
        assert elsewhere.delete(["a"], first.id)  # while it is being made
        assert elsewhere.page("a", None, 10).records[0].id == changed.id
        going.set()
        made = seen(elsewhere, waiting[1].id, "ready")
        assert made.pinned and made.expires is not None
        assert elsewhere.get(["a"], first.id) is None
        assert store.get(first.id) is None and store.get(waiting[0].id) is None
        assert elsewhere.page("a", None, 10).records == [made] and store.jobs.all("a") == []
    finally:
        going.set()
        maker.close()


@pytest.mark.parametrize(("ttl_s", "ends"), [(60.0, 3000.0), (6000.0, 6000.0), (None, None)])
def test_what_replaces_another_while_it_waits_ends_no_sooner_than_either(
    opened: Open, loaded: LoadedModel, going: Gate, ttl_s: float | None, ends: float | None
) -> None:
    store, elsewhere = opened(), PrefixRecords(opened())
    replaced = store.publish(*sample(range(100), namespace="a"), ttl_s=3000.0)
    maker = PrefixMaker(store, loaded, ratio=2.0)
    try:
        seen(elsewhere, asyncio.run(maker.create(new(0))).id, "running")
        waiting = asyncio.run(maker.create(new(1, ttl_s=ttl_s)))
        assert (waiting.status, waiting.expires, waiting.ttl_s) == ("queued", None, ttl_s)
        again = asyncio.run(maker.create(new(1, replaces=replaced.id)))
        assert (again.id, again.status, again.expires) == (waiting.id, "queued", None)
        going.set()
        made = seen(elsewhere, waiting.id, "ready")
        assert made.ttl_s is None
        assert made.expires == (ends and pytest.approx(store.catalog.now() + ends, abs=400))
    finally:
        going.set()
        maker.close()


def test_all_together_get_no_more_than_all_places(opened: Open, loaded: LoadedModel, going: Gate) -> None:
    maker = PrefixMaker(opened(), loaded, ratio=2.0, most_waiting=8)
    refused: list[str] = []

    def create(number: int) -> None:
        try:
            asyncio.run(maker.create(replace(new(number), namespace=f"n{number % 6}")))
        except Overloaded as error:
            refused.append(error.message)

    asyncio.run(maker.create(new(0)))
    assert going.reached.wait(240)
    callers = [threading.Thread(target=create, args=(number,)) for number in range(1, 25)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    waiting = [task.new.namespace for task in maker._waiting]
    assert len(waiting) == 8 and max(map(waiting.count, waiting)) <= 2
    assert len(refused) == 16 and all("wait to be made" in message for message in refused)
    closing = threading.Thread(target=maker.close)
    closing.start()
    going.set()
    closing.join()


def test_a_prefix_that_another_process_makes_keeps_nobody_waiting(opened: Open, loaded: LoadedModel) -> None:
    store, other = opened(), opened()
    expected = artifact_id(
        loaded.identity.fingerprint, "a", new(0).token_ids, CompressionSpec(ratio=2.0).canonical()
    )
    lease = other.catalog.lease(expected, "another")
    assert lease is not None
    maker, records = PrefixMaker(store, loaded, ratio=2.0), PrefixRecords(other)
    try:
        with lease:
            first, second, third = (asyncio.run(maker.create(new(number))) for number in range(3))
            assert first.id == expected
            seen(records, second.id, "ready")
            seen(records, third.id, "ready")
            seen(records, first.id, "queued", "running")
        seen(records, first.id, "ready")
    finally:
        maker.close()


def test_a_spec_is_used_as_it_is(opened: Open, loaded: LoadedModel) -> None:
    store, spec = opened(), CompressionSpec(rank_k=24, rank_v=24, sink=2)
    maker = PrefixMaker(store, loaded, ratio=2.0)
    try:
        made = asyncio.run(maker.create(new(0, spec=spec)))
        seen(PrefixRecords(store), made.id, "ready")
        assert store.manifest(made.id).spec == spec.canonical()
    finally:
        maker.close()


def test_what_is_asked_while_it_is_published_holds(
    opened: Open, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, elsewhere = opened(), PrefixRecords(opened())
    maker = PrefixMaker(store, loaded, ratio=2.0)
    publish = store.publish
    meanwhile: dict[str, Callable[[str], object]] = {
        "0": lambda name: elsewhere.change(["a"], name, PrefixChanges(pinned=True)),
        "1": lambda name: elsewhere.change(["a"], name, PrefixChanges(ttl_s=0)),
        "2": lambda name: elsewhere.delete(["a"], name),
    }

    def published(manifest: Any, *arguments: Any, **promised: Any) -> Any:
        meanwhile[manifest.document.uri](manifest.id)
        return publish(manifest, *arguments, **promised)

    monkeypatch.setattr(store, "publish", published)
    try:
        pinned, endless, gone, last = [
            asyncio.run(maker.create(new(number, ttl_s=60))) for number in (0, 1, 2, 0)
        ]
        assert seen(elsewhere, pinned.id, "ready").id == last.id
        seen(elsewhere, endless.id, "ready")
        end = time.monotonic() + 240  # what was published goes first, then its record
        while store.jobs.last("a", gone.id) is not None or store.get(gone.id) is not None:
            assert time.monotonic() < end
            time.sleep(0.02)
        found = elsewhere.get(["a"], pinned.id)
        assert found is not None and found.pinned and found.expires is not None
        found = elsewhere.get(["a"], endless.id)
        assert found is not None and not found.pinned and found.expires is None
        assert elsewhere.get(["a"], gone.id) is None
    finally:
        maker.close()


DEATHS: dict[str, Callable[[ArtifactStore], tuple[object, str]]] = {
    "before it is listed": lambda store: (store.catalog, "publish"),
    "before it looks": lambda store: (store.jobs, "finish"),
    "before it removes it": lambda store: (store, "remove"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("then", ["nothing", "asked for again", "made by somebody else"])
def test_what_a_deleted_job_published_is_removed_when_its_maker_died(
    opened: Open, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, death: str, then: str
) -> None:
    store, other = opened(), opened()
    elsewhere = PrefixRecords(other)
    dead, publish = threading.Event(), store.publish

    def published(manifest: Any, *arguments: Any, **promised: Any) -> Any:
        assert elsewhere.delete(["a"], manifest.id)
        return publish(manifest, *arguments, **promised)

    def die(*_: Any, **__: Any) -> None:
        dead.set()
        raise SystemExit  # ends the thread without a word

    monkeypatch.setattr(store, "publish", published)
    monkeypatch.setattr(*DEATHS[death](store), die)
    maker = PrefixMaker(store, loaded, ratio=2.0)
    made = asyncio.run(maker.create(new(0)))
    assert dead.wait(240)
    maker.close()
    assert other.blobs.exists(made.id)
    if then == "nothing":
        end = time.monotonic() + 240
        while (removed := elsewhere.remove_left()) == 0:  # its lease was just given back
            assert time.monotonic() < end
            time.sleep(0.02)
        assert removed == 1
        assert not other.blobs.exists(made.id) and elsewhere.get(["a"], made.id) is None
    else:
        again = PrefixMaker(other, loaded, ratio=2.0)
        try:
            if then == "asked for again":
                assert asyncio.run(again.create(new(0))).status == "queued"
                seen(elsewhere, made.id, "ready")
                while other.jobs.last("a", made.id) is not None:
                    time.sleep(0.02)
            else:
                manifest, tensors = other.load(made.id)
                other.publish(manifest.model_copy(update={"created": datetime.now(timezone.utc)}), tensors)
            assert elsewhere.remove_left() == 0
            assert seen(elsewhere, made.id, "ready")
        finally:
            again.close()
    assert other.jobs.publications() == [] and other.jobs.last("a", made.id) is None


def test_a_maker_that_is_closed_fails_what_waits(opened: Open, loaded: LoadedModel, going: Gate) -> None:
    store, elsewhere = opened(), PrefixRecords(opened())
    maker = PrefixMaker(store, loaded, ratio=2.0)
    first, second = (asyncio.run(maker.create(new(number))) for number in (0, 1))
    seen(elsewhere, first.id, "running")
    closing = threading.Thread(target=maker.close)
    closing.start()
    failed = seen(elsewhere, second.id, "failed")
    assert failed.error == STOPPED
    going.set()
    closing.join()
    assert seen(elsewhere, first.id, "ready")
    again = PrefixMaker(store, loaded, ratio=2.0)
    try:
        assert asyncio.run(again.create(new(1))).status == "queued"
        seen(elsewhere, second.id, "ready")
    finally:
        again.close()


def test_a_quota_that_is_found_exceeded_late_is_the_reason_of_the_failure(
    opened: Open, loaded: LoadedModel, going: Gate, tmp_path: Path
) -> None:
    store = opened()
    maker = PrefixMaker(store, loaded, ratio=2.0)
    try:
        made = asyncio.run(maker.create(new(0, pinned=True)))
        limits = tmp_path / "store" / "limits.json"
        limits.write_text('{"namespaces": {"a": {"bytes": 100}}}')
        with pytest.raises(QuotaExceeded, match="namespace a may hold 100 bytes"):
            asyncio.run(maker.create(new(1)))
        going.set()
        failed = seen(PrefixRecords(store), made.id, "failed")
        assert failed.error is not None and failed.error.startswith("namespace a may hold 100 bytes")
        assert list(store.blobs.ids()) == [] and not list((tmp_path / "store").rglob("retention/*/*"))
    finally:
        going.set()
        maker.close()


def test_a_redis_that_comes_back_empty_knows_the_jobs_again(
    opened: Open, loaded: LoadedModel, redis: RedisServer, going: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(prefix_maker, "VOUCH_S", 0.3)
    store, elsewhere = opened(), PrefixRecords(opened())
    maker = PrefixMaker(store, loaded, ratio=2.0)
    try:
        made = asyncio.run(maker.create(new(0)))
        seen(elsewhere, made.id, "running")
        assert going.reached.wait(240)  # its lease is taken: that needs Redis
        redis.kill()
        with pytest.raises(CatalogUnavailable):
            elsewhere.get(["a"], made.id)
        redis.start()
        seen(elsewhere, made.id, "running")
        going.set()
        seen(elsewhere, made.id, "ready")
    finally:
        going.set()
        maker.close()


@pytest.mark.parametrize("place", ["being made", "waiting"])
def test_what_was_deleted_does_not_come_back_with_a_maker_that_was_away(
    opened: Open, loaded: LoadedModel, going: Gate, place: str
) -> None:
    """For two days: the record of the deletion is gone."""
    store, elsewhere = opened(), PrefixRecords(opened())
    maker = PrefixMaker(store, loaded, ratio=2.0)
    try:
        both = [asyncio.run(maker.create(new(number))) for number in (0, 1)]
        assert going.reached.wait(240)
        gone, kept = both if place == "being made" else both[::-1]
        (task,) = (task for task in maker._unfinished() if task.job.id == gone.id)
        assert elsewhere.delete(["a"], gone.id)
        key = jobs.JOB_KEY.format(store=store.catalog.store_id, namespace="a", id=gone.id)
        store.catalog.link.call(lambda client: client.delete(key))
        task.job = task.job.model_copy(update={"created": task.job.created - 2 * 86_400})
        going.set()
        seen(elsewhere, kept.id, "ready")
        end = time.monotonic() + 240
        while maker._unfinished():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert elsewhere.get(["a"], gone.id) is None and list(store.blobs.ids()) == [kept.id]
        assert store.jobs.publications() == []
    finally:
        going.set()
        maker.close()


def test_over_http_every_process_tells_the_same(
    opened: Open, loaded: LoadedModel, served_model: ServedModel, redis: RedisServer, going: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two HTTP processes, one maker; it goes away without a word, then Redis does."""
    monkeypatch.setattr(jobs, "VOUCH_S", 6.0)
    maker = PrefixMaker(opened(), loaded, ratio=2.0)
    backend_store = opened()
    with paced_backend(loaded, backend_store) as backend:
        apps = [
            create_app(served_model, backend, prefixes=StoredPrefixes(opened(), maker), settings=SETTINGS)
            for _ in range(2)
        ]
        with serve(apps[0]) as one, serve(apps[1]) as two, one.http() as here, two.http() as there:
            made = here.post("/v1/prefixes", json={"document": DOCUMENT})
            assert made.status_code == 202, made.text
            path = f"/v1/prefixes/{made.json()['id']}"
            seen_there = there.get(path)
            assert seen_there.json()["status"] in ("queued", "running")
            assert there.post("/v1/prefixes", json={"document": DOCUMENT}).json()["id"] == made.json()["id"]
            assert [item["id"] for item in there.get("/v1/prefixes").json()["data"]] == [made.json()["id"]]
            for http in (here, there):  # its maker vouches every 10 s: between 6 and 10 it is dead for these
                end = time.monotonic() + 240
                while (failed := http.get(path).json())["status"] in ("queued", "running"):
                    assert time.monotonic() < end
                    time.sleep(0.05)
                assert (failed["status"], failed["error"]) == ("failed", STOPPED)
            going.set()
            end = time.monotonic() + 240
            while there.get(path).json()["status"] != "ready":
                assert time.monotonic() < end
                time.sleep(0.05)
            assert here.get(path).json() == there.get(path).json()
            assert there.get("/status").json()["prefixes_error"] is None
            redis.kill()
            for answer in (
                here.post("/v1/prefixes", json={"document": DOCUMENT}),
                there.get(path),
                there.get("/v1/prefixes"),
                there.delete(path),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
                assert "retry-after" in answer.headers
            status = there.get("/status").json()
            assert status["prefixes"] == [] and status["prefixes_error"].startswith("store_unavailable: ")
            redis.start()
    maker.close()


def test_a_second_model_over_the_same_weights(loaded: LoadedModel, store: ArtifactStore) -> None:
    other = sharing_weights(loaded).model
    pairs = list(zip(loaded.model.parameters(), other.parameters(), strict=True))
    assert pairs and all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    before = loaded.model.config._attn_implementation
    other.set_attn_implementation("eager")
    assert loaded.model.config._attn_implementation == before
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, loaded.model(ids).logits, atol=1e-4, rtol=1e-4)
    with paced_backend(loaded, store), pytest.raises(CacheMisuse, match="in use"):
        while True:
            sharing_weights(loaded)


def test_a_prefix_that_takes_the_device_with_it_is_told_of_first(
    opened: Open, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, elsewhere, lost, died = opened(), PrefixRecords(opened()), threading.Event(), threading.Event()

    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(prefix_maker, "compress", fail)
    monkeypatch.setattr(prefix_maker, "is_lost", lambda device: lost.is_set())
    maker = PrefixMaker(store, loaded, ratio=2.0, on_death=died.set)
    try:
        first = asyncio.run(maker.create(new(0)))
        assert seen(elsewhere, first.id, "failed").error == "internal error"
        lost.set()
        second = asyncio.run(maker.create(new(1)))
        assert died.wait(60)
        told = elsewhere.get(["a"], second.id)
        assert told is not None and (told.status, told.error) == ("failed", "internal error")
    finally:
        maker.close()
