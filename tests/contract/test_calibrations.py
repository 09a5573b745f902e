"""A store's calibrations, in a folder and in S3, with a real Redis."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from artifact_samples import sample
from calibration_samples import DOCUMENTS, FINGERPRINT, calibration
from redis_server import RedisServer

from xkv_artifacts.blobs import CALIBRATING
from xkv_artifacts.calibration_entry import CalibrationEntry
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, StoreError, UnsupportedFormat
from xkv_artifacts.store import ArtifactStore

OTHER = "e" * 64


@pytest.fixture(params=["folder", "s3"])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer
) -> Iterator[ArtifactStore]:
    if request.param == "s3":
        url = f"s3://{request.getfixturevalue('bucket')}/some/place"
    else:
        url = str(tmp_path_factory.mktemp("store"))
    with ArtifactStore.open(url, redis_server.url) as store:
        yield store


def publish(store: ArtifactStore, **changes: Any) -> str:
    return store.calibrations.publish(*calibration(**changes)).id


def content(store: ArtifactStore, identity: str) -> bytes:
    with store.calibrations.blobs.open(identity) as file:
        return file.read()


def overwrite(store: ArtifactStore, identity: str, blob: bytes) -> None:
    store.calibrations.blobs.put(identity, lambda file: file.write(blob))


def damage(store: ArtifactStore, identity: str, position: int = -1) -> None:
    blob = bytearray(content(store, identity))
    blob[position] ^= 1
    overwrite(store, identity, bytes(blob))


def test_what_is_published_is_listed_and_loaded(store: ArtifactStore) -> None:
    manifest, tensors = calibration()
    written = store.calibrations.publish(manifest, tensors)
    found, loaded = store.calibrations.load(written.id)
    assert found == written == store.calibrations.manifest(written.id)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert store.calibrations.entries() == [
        CalibrationEntry(
            id=written.id,
            bytes=len(content(store, written.id)),
            model="tiny",
            fingerprint=FINGERPRINT,
            documents=len(DOCUMENTS),
            tokens=80,
            groups=2,
            created=manifest.created.timestamp(),
        )
    ]
    assert store.calibrations.newest(FINGERPRINT) == written
    assert [(check.fault, check.calibration) for check in store.verify()] == [(None, True)]


def test_prefixes_and_calibrations_are_kept_apart(store: ArtifactStore) -> None:
    prefix, mine = store.publish(*sample()).id, publish(store)
    assert [entry.id for entry in store.entries()] == [prefix] == list(store.blobs.ids())
    assert [entry.id for entry in store.calibrations.entries()] == [mine] == store.calibrations.ids()
    assert [(check.artifact_id, check.calibration) for check in store.verify()] == [
        (prefix, False),
        (mine, True),
    ]
    assert [check.calibration for check in store.verify([mine, prefix])] == [True, False]
    for missing in (lambda: store.load(mine), lambda: store.calibrations.load(prefix)):
        with pytest.raises(ArtifactNotFound):
            missing()
    assert not store.remove(mine) and not store.calibrations.remove(prefix)
    assert store.calibrations.remove(mine) and not store.calibrations.remove(mine)
    assert store.calibrations.entries() == [] and store.load(prefix)


def test_the_newest_of_a_model_is_found(store: ArtifactStore) -> None:
    assert store.calibrations.newest(FINGERPRINT) is None
    old, new = publish(store, hours=1), publish(store, seed=1, hours=2)
    other = publish(store, fingerprint=OTHER, hours=3)
    assert [entry.id for entry in store.calibrations.entries()] == [other, new, old]
    assert [entry.id for entry in store.calibrations.entries(FINGERPRINT)] == [new, old]
    newest = store.calibrations.newest(FINGERPRINT)
    assert newest is not None and newest.id == new
    damage(store, new, 100)
    newest = store.calibrations.newest(FINGERPRINT)
    assert newest is not None and newest.id == old
    assert [entry.id for entry in store.calibrations.entries()] == [other, old]
    store.calibrations.blobs.remove(old)
    assert store.calibrations.newest(FINGERPRINT) is None
    assert [entry.id for entry in store.calibrations.entries()] == [other]


def test_a_lying_redis_cannot_make_it_another_models(store: ArtifactStore) -> None:
    old, new = publish(store, hours=1), publish(store, seed=1, hours=2)
    other = publish(store, fingerprint=OTHER)
    for entry in store.calibrations.entries():
        lie = {"fingerprint": FINGERPRINT, "created": 9e9 if entry.id in (other, old) else 1.0}
        store.calibrations.catalog.put(entry.model_copy(update=lie))
    newest = store.calibrations.newest(FINGERPRINT)
    assert newest is not None and newest.id == new
    assert store.calibrations.newest(OTHER) is None


def test_a_damaged_entry_is_told_and_left_out(store: ArtifactStore) -> None:
    bad, good = publish(store), publish(store, seed=1)
    key = store.calibrations.catalog.entry_key(bad)
    order = store.calibrations.catalog.order_key
    store.catalog.link.call(lambda client: client.hset(key, "tokens", "many"))
    store.catalog.link.call(lambda client: client.zadd(order, {"../../x": 7.0}))
    faults: list[str] = []
    found = store.calibrations.entries(on_fault=lambda fault: faults.append(fault.message))
    assert [entry.id for entry in found] == [good] and len(faults) == 2
    newest = store.calibrations.newest(FINGERPRINT)
    assert newest is not None and newest.id == good
    store.rebuild()
    assert {entry.id for entry in store.calibrations.entries()} == {bad, good}


def test_a_bad_blob_gives_no_tensor_and_is_moved_away(store: ArtifactStore) -> None:
    bad, good = publish(store), publish(store, seed=1)
    damage(store, bad)
    faults = {check.artifact_id: check.fault for check in store.verify()}
    assert faults[good] is None and "checksum" in str(faults[bad])
    with pytest.raises(
        CorruptArtifact, match=f"calibration {bad}: tensor .* checksum .*quarantine"
    ) as caught:
        store.calibrations.load(bad)
    assert caught.value.hint == "run xkv calibrate again"
    assert [entry.id for entry in store.calibrations.entries()] == [good]
    with pytest.raises(ArtifactNotFound, match=f"{bad} is not in .*/calibrations"):
        store.calibrations.load(bad)
    assert publish(store) == bad and store.calibrations.load(bad)[0].id == bad


def test_a_blob_under_another_ones_name_is_bad(store: ArtifactStore) -> None:
    first, second = publish(store), publish(store, seed=1)
    overwrite(store, first, content(store, second))
    assert store.calibrations.fault(first) == f"the blob is artifact {second}"
    for read in (store.calibrations.manifest, store.calibrations.load):
        with pytest.raises((CorruptArtifact, ArtifactNotFound), match=first):
            read(first)


def test_a_prefix_in_the_place_of_a_calibration_is_no_calibration(store: ArtifactStore) -> None:
    prefix, mine = store.publish(*sample()).id, publish(store)
    with store.blobs.open(prefix) as file:
        overwrite(store, mine, file.read())
    with pytest.raises(UnsupportedFormat, match=f"calibration {mine}: format 'xkv-prefix'"):
        store.calibrations.load(mine)
    assert store.calibrations.newest(FINGERPRINT) is None


@pytest.mark.parametrize("identity", ["../../etc/passwd", "", "A" * 64, "0" * 63])
def test_what_is_no_id_names_no_file(store: ArtifactStore, identity: str) -> None:
    for read in (store.calibrations.load, store.calibrations.manifest, store.calibrations.remove):
        with pytest.raises(ArtifactNotFound, match="not an artifact id"):
            read(identity)


def test_an_emptied_redis_is_rebuilt_from_the_blobs(store: ArtifactStore) -> None:
    prefix = store.publish(*sample()).id
    first, second, bad = publish(store), publish(store, seed=1, hours=1), publish(store, seed=2)
    before = store.calibrations.entries()
    damage(store, bad, 100)
    store.catalog.clear()
    assert store.calibrations.entries() == [] and store.calibrations.newest(FINGERPRINT) is None
    report = store.rebuild()
    assert (report.artifacts, report.calibrations) == (1, 2)
    assert [(fault.artifact_id, fault.calibration) for fault in report.faults] == [(bad, True)]
    assert store.calibrations.entries() == [entry for entry in before if entry.id != bad]
    newest = store.calibrations.newest(FINGERPRINT)
    assert newest is not None and newest.id == second and newest.id != first
    assert [entry.id for entry in store.entries()] == [prefix]


def test_orphans_are_collected_and_no_calibration_is(store: ArtifactStore) -> None:
    unlisted, stored, gone = publish(store), publish(store, seed=1), publish(store, seed=2)
    store.calibrations.catalog.drop(unlisted)
    store.calibrations.blobs.remove(gone)
    report = store.collect_orphans()
    assert (report.entries_dropped, report.blobs_listed) == (1, 1)
    assert {entry.id for entry in store.calibrations.entries()} == {unlisted, stored}


def test_artifacts_whose_calibration_is_gone_or_damaged_are_named(store: ArtifactStore) -> None:
    kept, damaged, gone = publish(store), publish(store, seed=1), publish(store, seed=2)
    artifacts = {}
    for number, (needed, basis) in enumerate(
        [(kept, "calibrated"), (damaged, "calibrated"), (gone, "calibrated"), (gone, "document")]
    ):
        spec = {"calibration": needed, "basis": basis}
        artifacts[needed, basis] = store.publish(*sample(range(number, number + 90), spec=spec)).id
    no_id = store.publish(*sample(range(50, 99), spec={"calibration": "../x", "basis": "calibrated"})).id
    damage(store, damaged)
    store.calibrations.remove(gone)
    faults = {found.artifact_id: found.fault for found in store.verify() if found.fault is not None}
    assert set(faults) == {
        damaged, no_id, artifacts[damaged, "calibrated"], artifacts[gone, "calibrated"]
    }  # fmt: skip
    told = faults[artifacts[gone, "calibrated"]]
    assert f"without calibration {gone[:12]}: it is not in the store" in told
    assert "checksum" in faults[artifacts[damaged, "calibrated"]]
    (alone,) = store.verify([artifacts[gone, "calibrated"]])
    assert alone.fault == told
    assert store.manifest(artifacts[gone, "calibrated"]), "nothing was moved"


def test_sums_that_nobody_goes_on_with_are_removed(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = store.blobs.of(CALIBRATING)
    old, used = "1" * 64, "2" * 64
    for key in (old, used):
        sums.put(key, lambda file: file.write(b"sums"))
        assert 0 <= sums.age(key) < 60
    assert store.collect_orphans().sums == 0
    with pytest.raises(ArtifactNotFound):
        sums.age("3" * 64)
    monkeypatch.setattr("xkv_artifacts.store.SUMS_KEPT_S", -1.0)
    lease = store.catalog.lease(used, "somebody")
    assert lease is not None
    with lease:
        assert store.collect_orphans().sums == 1
        assert list(sums.ids()) == [used]
    assert store.collect_orphans().sums == 1 and list(sums.ids()) == []


def test_a_writer_that_fails_leaves_nothing(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xkv_artifacts.calibration_format.write_calibration", full)
    with pytest.raises(StoreError, match="no space left"):
        publish(store)
    assert store.calibrations.ids() == []
    assert store.blobs.remove_temporary() == (0, 0)


def test_two_stores_in_one_redis_do_not_see_each_other(
    store: ArtifactStore, tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer
) -> None:
    mine = publish(store)
    with ArtifactStore.open(str(tmp_path_factory.mktemp("other")), redis_server.url) as other:
        assert other.calibrations.entries() == [] and other.calibrations.newest(FINGERPRINT) is None
        theirs = publish(other, seed=1)
        other.rebuild()
        assert [entry.id for entry in other.calibrations.entries()] == [theirs]
    assert [entry.id for entry in store.calibrations.entries()] == [mine]


def test_an_embedded_catalog_that_was_lost_lists_them_again(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("store")
    with ArtifactStore.open(str(folder)) as store:
        mine = publish(store)
    (folder / "catalog" / "catalog.aof").unlink()
    with ArtifactStore.open(str(folder)) as store:
        newest = store.calibrations.newest(FINGERPRINT)
    assert newest is not None and newest.id == mine


def _publish_many(url: str, redis_url: str, seeds: list[int]) -> None:
    with ArtifactStore.open(url, redis_url) as store:
        for seed in seeds:
            publish(store, seed=seed, hours=seed)


def test_two_processes_publish_at_once(store: ArtifactStore) -> None:
    context = multiprocessing.get_context("spawn")
    url, redis_url = store.blobs.url, store.redis_url
    writers = [
        context.Process(target=_publish_many, args=(url, redis_url, [*range(start, 12, 2), 99]))
        for start in (0, 1)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = store.calibrations.entries()
    assert len(found) == 13 and [entry.id for entry in found] == [
        publish(store, seed=seed, hours=seed) for seed in (99, *range(11, -1, -1))
    ]
    assert all(check.fault is None for check in store.verify())
