"""A blob that is gone though its artifact is listed is lost, unless the artifact was deleted or has ended.

With a real Redis: who notices, what is noted, and what comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import FINGERPRINT, sample
from redis_server import RedisServer

from xkv_artifacts.blobs import STORE_FILE, blob_name
from xkv_artifacts.damage_board import Note
from xkv_artifacts.errors import ArtifactNotFound, MissingBlob, StoreError
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.limits import Limits, Quota
from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.origin import Origin
from xkv_artifacts.retention import Retention
from xkv_artifacts.store import ArtifactStore
from xkv_artifacts.token_cache import TokenCache

PROMPT = range(100)


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def path_of(store: ArtifactStore, artifact_id: str) -> Path:
    return Path(store.blobs.url) / blob_name(artifact_id)


def lose(store: ArtifactStore, artifact_id: str) -> None:
    path_of(store, artifact_id).unlink()


def looked_up(store: ArtifactStore) -> list[tuple[str, type[Exception]]]:
    """What a lookup in a process that knows no artifact says is lost."""
    told: list[tuple[str, type[Exception]]] = []
    store._lookup._tokens = TokenCache()
    match = store.lookup(
        FINGERPRINT, "default", PROMPT, on_lost=lambda name, error: told.append((name, type(error)))
    )
    assert match is None
    return told


FOUND: dict[str, Callable[[ArtifactStore, str], object]] = {
    "it is loaded": lambda store, name: pytest.raises(MissingBlob, store.load, name),
    "its header is read": lambda store, name: pytest.raises(MissingBlob, store.manifest, name),
    "it is asked for": lambda store, name: store.get(name),
    "it is pinned": lambda store, name: pytest.raises(ArtifactNotFound, store.pin, name),
    "orphans are listed": lambda store, name: store.collect_orphans(),
    "a prompt is looked up": lambda store, name: looked_up(store),
}


@pytest.mark.parametrize("how", FOUND)
def test_a_lost_blob_is_noted_once_and_not_listed_any_more(store: ArtifactStore, how: str) -> None:
    made = store.publish(*sample())
    lose(store, made.id)
    FOUND[how](store, made.id)
    assert store.damaged.all() == {made.id: Note(Origin.of_manifest(made), missing=True)}
    assert store.catalog.get(made.id) is None and store.usage("default").bytes == 0
    assert store.damaged.take(made.id)
    for again in (lambda: store.load(made.id), lambda: store.manifest(made.id)):
        with pytest.raises(ArtifactNotFound) as caught:
            again()
        assert not isinstance(caught.value, MissingBlob)
    assert store.get(made.id) is None and looked_up(store) == []
    assert store.damaged.all() == {}


def test_it_is_told_in_one_line(store: ArtifactStore) -> None:
    made = store.publish(*sample())
    lose(store, made.id)
    assert store.missing([made.id]) == {made.id}
    line = f"artifact {made.id} is missing: its file is gone from {store.blobs.url}"
    assert [one.fault for one in store.verify()] == [line]
    assert store.catalog.get(made.id) is not None  # to look changes nothing
    with pytest.raises(MissingBlob) as caught:
        store.load(made.id)
    assert caught.value.message == line and caught.value.hint == "compute it again"
    assert store.missing([made.id]) == set()


def collected(store: ArtifactStore, artifact_id: str) -> None:
    assert store.collect(Limits(each=Quota(artifacts=0))).removed


def ended(store: ArtifactStore, artifact_id: str) -> None:
    store.set_ttl(artifact_id, 0.2)
    lose(store, artifact_id)
    time.sleep(0.3)


def ended_in_the_store_alone(store: ArtifactStore, artifact_id: str) -> None:
    store.set_ttl(artifact_id, 0.2)
    store.catalog.retain(artifact_id, Retention())
    lose(store, artifact_id)
    time.sleep(0.3)


GONE = [lambda store, name: store.remove(name), collected, ended, ended_in_the_store_alone]


@pytest.mark.parametrize("gone", GONE, ids=["deleted", "collected", "ended", "ended by its file"])
@pytest.mark.parametrize("how", FOUND)
def test_what_was_deleted_or_has_ended_is_not_missed(
    store: ArtifactStore, how: str, gone: Callable[[ArtifactStore, str], None]
) -> None:
    made = store.publish(*sample())
    gone(store, made.id)
    if how.startswith("it") and how != "it is asked for":
        with pytest.raises(ArtifactNotFound) as caught:
            {"it is pinned": store.pin}.get(how, store.manifest)(made.id)
        assert not isinstance(caught.value, MissingBlob)
    else:
        assert FOUND[how](store, made.id) != [(made.id, MissingBlob)]
    assert store.damaged.all() == {} and store.missing([made.id]) == set()


@pytest.mark.parametrize("gone", [lambda store, name: store.remove(name), collected])
def test_who_lists_again_what_is_deleted_meanwhile_does_not_bring_it_back(
    store: ArtifactStore, gone: Callable[[ArtifactStore, str], None]
) -> None:
    """It had read the blob before the deletion, and writes the entry after it."""
    made = store.publish(*sample())
    entry = store.get(made.id)
    assert entry is not None
    gone(store, made.id)
    for look in (lambda: looked_up(store), lambda: store.get(made.id), store.collect_orphans):
        store.catalog.publish(entry, token_bytes(PROMPT))
        look()
        assert store.damaged.all() == {} and store.catalog.get(made.id) is None


def test_what_is_stored_again_after_its_deletion_is_missed(store: ArtifactStore) -> None:
    made = store.publish(*sample())
    store.remove(made.id)
    store.publish(*sample())
    lose(store, made.id)
    assert looked_up(store) == [(made.id, MissingBlob)]


@pytest.mark.parametrize("end", ["stored again", "deleted"])
def test_a_note_ends_with_the_loss(store: ArtifactStore, end: str) -> None:
    made = store.publish(*sample())
    lose(store, made.id)
    store.get(made.id)
    assert list(store.damaged.all()) == [made.id]
    store.remove(made.id) if end == "deleted" else store.publish(*sample())
    assert store.damaged.all() == {}


def test_of_many_who_notice_at_once_one_is_told(store: ArtifactStore) -> None:
    made = store.publish(*sample())
    lose(store, made.id)

    def load(_: int) -> type[Exception]:
        with pytest.raises(ArtifactNotFound) as caught:
            store.load(made.id)
        return caught.type

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(load, range(16)))
    assert told.count(MissingBlob) == 1 and list(store.damaged.all()) == [made.id]


def test_a_blob_that_comes_back_is_listed_again(store: ArtifactStore, tmp_path: Path) -> None:
    made = store.publish(*sample(), pinned=True)
    blob, away = path_of(store, made.id), tmp_path / "away"
    for back in (lambda: store.list_returned(), lambda: store.get(made.id), lambda: store.load(made.id)):
        blob.rename(away)
        assert looked_up(store) == [(made.id, MissingBlob)]
        assert store.list_returned() == 0
        away.rename(blob)
        back()
        store.list_returned()
        entry = store.get(made.id)
        assert entry is not None and entry.pinned and store.damaged.all() == {}
        assert store.load(made.id)[0].id == made.id


def test_a_blob_that_is_there_a_moment_later_is_not_missed(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is behind; the artifact stays listed."""
    made = store.publish(*sample())
    opened = LocalBlobStore.open

    def behind(blobs: LocalBlobStore, name: str) -> Any:
        monkeypatch.undo()
        path = path_of(store, name)
        path.rename(path.with_suffix(".late"))
        try:
            return opened(blobs, name)
        finally:
            path.with_suffix(".late").rename(path)

    monkeypatch.setattr(LocalBlobStore, "open", behind)
    assert looked_up(store) == []
    match = store.lookup(FINGERPRINT, "default", PROMPT)
    assert match is not None and match.artifact_id == made.id and store.damaged.all() == {}


def test_its_pin_and_its_end_are_kept_though_their_file_is_lost_too(store: ArtifactStore) -> None:
    made = store.publish(*sample(), pinned=True, ttl_s=900.0)
    promised = store.promised(made.id)[0]
    lose(store, made.id)
    (Path(store.blobs.url) / blob_name(made.id, "retention", ".json")).unlink()
    assert looked_up(store) == [(made.id, MissingBlob)]
    assert store.promised(made.id)[0] == promised
    store.publish(*sample())
    entry = store.get(made.id)
    assert entry is not None and entry.pinned and entry.expires == promised.expires


@pytest.mark.parametrize("what", ["nothing", "another store"])
def test_a_store_that_is_not_mounted_has_lost_nothing(
    store: ArtifactStore, tmp_path: Path, what: str
) -> None:
    made: PrefixManifest = store.publish(*sample())
    root, away = Path(store.blobs.url), tmp_path / "away"
    root.rename(away)
    root.mkdir()
    if what == "another store":
        LocalBlobStore(root).store_id()
    for look in (lambda: store.load(made.id), lambda: store.get(made.id), lambda: looked_up(store)):
        with pytest.raises(StoreError, match=f"its {STORE_FILE} is gone or another's"):
            look()
    with pytest.raises(StoreError):
        store.collect_orphans()
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()
    away.rename(root)
    assert store.get(made.id) is not None and store.load(made.id)[0].id == made.id


def test_where_redis_does_not_answer_nothing_is_missed(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "store"), own_redis.url, patience_s=0) as store:
        made = store.publish(*sample())
        lose(store, made.id)
        own_redis.kill()
        with pytest.raises(ArtifactNotFound) as caught:
            store.manifest(made.id)
        assert not isinstance(caught.value, MissingBlob)


@pytest.mark.parametrize("junk", ["the entry", "the notes", "the end"])
def test_what_redis_says_is_not_believed(store: ArtifactStore, junk: str) -> None:
    """Of types that no key of ours has, and of values that are none; the answer is an error or a miss."""
    made = store.publish(*sample())
    lose(store, made.id)
    key = f"xkv:1:{store.catalog.store_id}:"
    if junk == "the end":
        store.catalog.link.call(lambda client: client.hset(f"{key}entry:{made.id}", "expires", "soon"))
    else:
        name = f"entry:{made.id}" if junk == "the entry" else "damaged"
        store.catalog.link.call(lambda client: (client.delete(key + name), client.set(key + name, "x")))
    with pytest.raises(ArtifactNotFound, match=made.id):
        store.manifest(made.id)
    assert (made.id, MissingBlob) not in looked_up(store) and store.catalog.get(made.id) is None
