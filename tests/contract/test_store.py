"""The store as the rest of the project uses it: local blobs, a real Redis."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from artifact_samples import FINGERPRINT, SPEC, sample
from hostile_blobs import field, rebuilt
from redis_server import RedisServer

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CorruptArtifact,
    InvalidNamespace,
    MissingTensor,
    StoreError,
    UnsupportedFormat,
)
from xkv_artifacts.format import write_prefix
from xkv_artifacts.store import ArtifactStore, Match, Rebuild


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def publish(store: ArtifactStore, length: int = 100, **changes: object) -> str:
    return store.publish(*sample(range(length), **changes)).id  # type: ignore[arg-type]


def path_of(store: ArtifactStore, artifact_id: str) -> Path:
    return Path(store.blobs.url) / blob_name(artifact_id)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_published_is_listed_found_and_loaded(store: ArtifactStore) -> None:
    manifest, tensors = sample()
    written = store.publish(manifest, tensors)
    found, loaded = store.load(manifest.id)
    assert found == written == store.manifest(manifest.id)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    (entry,) = store.entries()
    assert entry == store.get(manifest.id) or entry.last_used < store.entries()[0].last_used
    assert entry.bytes == path_of(store, manifest.id).stat().st_size
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(manifest.id, 100)
    assert list(store.load(manifest.id, ["group.0.key.bases.1"])[1]) == ["group.0.key.bases.1"]


def test_loading_is_noted(store: ArtifactStore) -> None:
    first, second = publish(store, 50), publish(store, 60)
    before = {entry.id: entry.last_used for entry in store.entries()}
    store.load(first)
    assert [entry.id for entry in store.entries()] == [first, second]
    assert store.entries()[0].last_used > before[first]


def test_prefixes_of_artifacts_and_of_prompts_count(store: ArtifactStore) -> None:
    short, long = publish(store, 70), publish(store, 300)
    assert store.lookup(FINGERPRINT, "default", range(1000)) == Match(long, 300)
    assert store.lookup(FINGERPRINT, "default", range(200)) == Match(long, 200)
    assert store.lookup(FINGERPRINT, "default", [*range(90), 5, 5]) in (Match(short, 70), Match(long, 90))
    assert store.lookup(FINGERPRINT, "default", [9, 9]) is None
    assert store.lookup(FINGERPRINT, "default", []) is None
    assert store.lookup("0" * 64, "default", range(100)) is None
    assert store.lookup(FINGERPRINT, "other", range(100)) is None
    with pytest.raises(InvalidNamespace):
        store.lookup(FINGERPRINT, "../x", range(100))


@pytest.mark.parametrize("best", range(3))
def test_of_the_same_tokens_the_most_exact_artifact_is_served(store: ArtifactStore, best: int) -> None:
    ids = []
    for number in range(3):
        manifest, tensors = sample(spec={**SPEC, "ratio": 8.0 * 2**number})
        fidelity = manifest.fidelity.model_copy(update={"top1_agreement": 0.75 + 0.25 * (number == best)})
        ids.append(store.publish(manifest.model_copy(update={"fidelity": fidelity}), tensors).id)
    for length in (90, 100, 200):
        match = store.lookup(FINGERPRINT, "default", range(length))
        assert match == Match(ids[best], min(length, 100)) and match.fidelity == 1


@pytest.mark.parametrize("largest", range(3))
def test_of_equally_exact_artifacts_the_largest_is_served(store: ArtifactStore, largest: int) -> None:
    ids = []
    for number in range(3):
        uri = "d" * (500 if number == largest else 5)  # in the header, and so in the blob's size
        ids.append(publish(store, spec={**SPEC, "ratio": 8.0 * 2**number}, uri=uri))
    assert store.lookup(FINGERPRINT, "default", range(200)) == Match(ids[largest], 100)


def test_a_lying_index_cannot_cause_a_wrong_match(store: ArtifactStore) -> None:
    other = publish(store, 64, namespace="secret")
    mine = publish(store, 20)
    entry = store.get(other)
    assert entry is not None
    # Redis now says that the other namespace's artifact is mine and has quite other tokens.
    store.catalog.publish(entry.model_copy(update={"namespace": "default"}), bytes(4 * 30))
    assert store.lookup(FINGERPRINT, "default", [0] * 30) in (None, Match(mine, 1))
    assert store.lookup(FINGERPRINT, "default", range(64)) == Match(mine, 20)
    wrong = store.get(mine)
    assert wrong is not None
    store.catalog.publish(wrong, bytes(4 * 1000))
    assert store.lookup(FINGERPRINT, "default", [0] * 1000) == Match(mine, 1)


def test_a_bad_blob_gives_no_tensor_and_is_moved_away(store: ArtifactStore) -> None:
    bad, good = publish(store, 100), publish(store, 50)
    flip(path_of(store, bad), -1)
    with pytest.raises(CorruptArtifact, match=f"artifact {bad}: tensor .* checksum .*quarantine") as caught:
        store.load(bad)
    assert caught.value.hint == "compute it again"
    assert store.get(bad) is None and [entry.id for entry in store.entries()] == [good]
    with pytest.raises(ArtifactNotFound):
        store.load(bad)
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(good, 50)
    assert publish(store, 100) == bad
    assert store.load(bad)[0].id == bad


def test_a_bad_blob_met_by_a_lookup_hides_nothing(store: ArtifactStore) -> None:
    bad, good = publish(store, 100), publish(store, 50)
    flip(path_of(store, bad), 60)
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(good, 50)
    assert store.get(bad) is None


def test_a_blob_under_another_ones_name_is_bad(store: ArtifactStore) -> None:
    first, second = publish(store, 50), publish(store, 60)
    path_of(store, first).write_bytes(path_of(store, second).read_bytes())
    assert [check.fault for check in store.verify([first])] == [f"the blob is artifact {second}"]
    with pytest.raises(CorruptArtifact, match=f"the blob is artifact {second}"):
        store.load(first)


def test_another_versions_blob_is_left_where_it_is(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    path_of(store, artifact_id).write_bytes(rebuilt(field("version", 2)))
    with pytest.raises(UnsupportedFormat, match=artifact_id):
        store.load(artifact_id)
    assert path_of(store, artifact_id).exists()
    assert store.lookup(FINGERPRINT, "default", range(100)) is None


def test_verify_names_every_fault_and_changes_nothing(store: ArtifactStore) -> None:
    good, bad, gone = publish(store, 10), publish(store, 20), publish(store, 30)
    flip(path_of(store, bad), -5)
    path_of(store, gone).unlink()
    faults = {check.artifact_id: check.fault for check in store.verify()}
    assert (
        faults[good] is None
        and "checksum" in str(faults[bad])
        and "is missing: its file is gone" in str(faults[gone])
    )
    assert path_of(store, bad).exists() and len(faults) == 3
    assert [check.fault for check in store.verify([good])] == [None]
    assert "not an artifact id" in str(next(iter(store.verify(["../x"]))).fault)


def test_removed_means_gone(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    assert store.remove(artifact_id) and not store.remove(artifact_id)
    assert store.lookup(FINGERPRINT, "default", range(100)) is None and store.entries() == []


def test_an_emptied_redis_is_rebuilt_from_the_blobs(store: ArtifactStore) -> None:
    ids = {publish(store, length) for length in (10, 20, 30)}
    before = {entry.id: entry.model_copy(update={"last_used": 0}) for entry in store.entries()}
    bad = publish(store, 40)
    flip(path_of(store, bad), -1)
    flip(path_of(store, bad), 100)
    (Path(store.blobs.url) / "prefixes" / "zz").mkdir()
    store.catalog.clear()
    assert store.entries() == [] and store.lookup(FINGERPRINT, "default", range(30)) is None
    report = store.rebuild()
    assert report.artifacts == 3 and [fault.artifact_id for fault in report.faults] == [bad]
    assert {entry.id: entry.model_copy(update={"last_used": 0}) for entry in store.entries()} == before
    assert before.keys() == ids
    match = store.lookup(FINGERPRINT, "default", range(30))
    assert match is not None and match.tokens == 30
    assert store.rebuild() == Rebuild(3, ())


def test_a_catalog_that_was_lost_is_listed_again_once(store: ArtifactStore) -> None:
    known = publish(store)
    assert store.list_if_lost() == Rebuild(1, (), 0)  # nobody had listed this store yet
    assert store.list_if_lost() is None
    store.catalog.clear()
    assert store.lookup(FINGERPRINT, "default", range(100)) is None
    with store.catalog.lease("listing", "somebody else") or pytest.fail("leased"):
        assert store.list_if_lost() is None
    assert store.list_if_lost() == Rebuild(1, (), 0)
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(known, 100)


@pytest.mark.parametrize("times", [1, 9])
def test_a_catalog_that_is_lost_while_it_is_listed_is_listed_again(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """A Redis that dies and comes back empty; one that does so all the time is not taken for complete."""
    known, list_all, left = publish(store), store._listing.list_all, [None] * times

    def lose() -> object:
        listed = list_all()
        if left:
            left.pop()
            store.catalog.link.call(lambda client: client.flushdb())
        return listed

    monkeypatch.setattr(store._listing, "list_all", lose)
    assert store.list_if_lost() == Rebuild(1, (), 0)
    assert store.catalog.is_built() == (times == 1)
    while not store.catalog.is_built():
        assert store.entries() == [] and store.list_if_lost() is not None
    assert not left and store.list_if_lost() is None
    assert store.lookup(FINGERPRINT, "default", range(100)) == Match(known, 100)
    assert not store.catalog.link.call(lambda client: client.keys("*:listing:*"))


def test_rebuild_mends_a_damaged_catalog(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    prefix = f"xkv:1:{store.catalog.store_id}:"
    store.catalog.link.call(lambda client: [client.set(key, "junk") for key in client.keys(prefix + "*")])
    with pytest.raises(CatalogError):
        store.entries()
    store.rebuild()
    assert [entry.id for entry in store.entries()] == [artifact_id]


def test_get_follows_the_blobs(store: ArtifactStore) -> None:
    artifact_id = publish(store)
    store.catalog.clear()
    entry = store.get(artifact_id)
    assert entry is not None and store.entries() == [entry]
    key = f"xkv:1:{store.catalog.store_id}:entry:{artifact_id}"
    store.catalog.link.call(lambda client: client.hset(key, "tokens", "junk"))
    assert store.get(artifact_id) == entry == store.entries()[0]
    path_of(store, artifact_id).unlink()
    assert store.get(artifact_id) is None and store.entries() == []


def test_orphans_are_collected_and_no_artifact_is(store: ArtifactStore) -> None:
    unlisted, stored, without_blob = publish(store, 10), publish(store, 20), publish(store, 30)
    store.catalog.drop(unlisted)
    path_of(store, without_blob).unlink()
    (Path(store.blobs.url) / "tmp" / "left").write_bytes(b"12345")
    report = store.collect_orphans()
    assert (report.files, report.bytes, report.entries_dropped, report.blobs_listed) == (1, 5, 1, 1)
    assert {entry.id for entry in store.entries()} == {unlisted, stored}
    again = store.collect_orphans()
    assert (again.files, again.entries_dropped, again.blobs_listed) == (0, 0, 0)


def test_stores_share_a_redis_without_seeing_each_other(tmp_path: Path, redis_server: RedisServer) -> None:
    stores = [ArtifactStore.open(str(tmp_path / name), redis_server.url) for name in "ab"]
    publish(stores[0])
    assert stores[1].entries() == [] and stores[1].lookup(FINGERPRINT, "default", range(100)) is None
    (tmp_path / "a").rename(tmp_path / "moved")
    with ArtifactStore.open(str(tmp_path / "moved"), redis_server.url) as moved:
        assert moved.lookup(FINGERPRINT, "default", range(100))
    for store in stores:
        store.close()


def test_nothing_is_published_when_manifest_and_tensors_do_not_fit(store: ArtifactStore) -> None:
    manifest, tensors = sample()
    with pytest.raises(CorruptArtifact):
        store.publish(manifest.model_copy(update={"id": "0" * 64}), tensors)
    assert list(store.blobs.ids()) == [] and store.entries() == []


def test_missing_tensors_and_stores_are_told(store: ArtifactStore, tmp_path: Path) -> None:
    artifact_id = publish(store)
    with pytest.raises(MissingTensor, match="no tensor x"):
        store.load(artifact_id, ["x"])
    assert store.get(artifact_id)
    with pytest.raises(StoreError, match="there is no store"):
        ArtifactStore.open(str(tmp_path / "typo"), create=False)
    with pytest.raises(ArtifactNotFound):
        store.load("../../etc/passwd")


def test_many_threads_publish_and_load_at_once(store: ArtifactStore) -> None:
    faults: list[Exception] = []

    def work(number: int) -> None:
        try:
            for length in range(10, 20):
                artifact_id = publish(store, length + number % 2)
                store.load(artifact_id)
                store.lookup(FINGERPRINT, "default", range(30))
        except Exception as error:  # noqa: BLE001 - the test's own thread hands it on
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and len(store.entries()) == 11
    assert all(check.fault is None for check in store.verify())


def test_a_manifest_holds_no_machine_specific_bytes(store: ArtifactStore) -> None:
    manifest, tensors = sample()
    first = path_of(store, store.publish(manifest, tensors).id).read_bytes()
    with (Path(store.blobs.url) / "again").open("wb") as file:
        write_prefix(file, manifest, tensors)
    assert (Path(store.blobs.url) / "again").read_bytes() == first
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert set(header["__metadata__"]) == {"xkv"}
