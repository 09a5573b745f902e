"""Notes of damaged prefixes in a real Redis: made where tokens are missing, bounded, never believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import FINGERPRINT, sample
from redis_server import RedisServer

from xkv_artifacts import damage_board as module
from xkv_artifacts.blobs import blob_name
from xkv_artifacts.checked_file import open_header
from xkv_artifacts.damage_board import DAMAGED_KEY, Note
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.origin import Origin
from xkv_artifacts.store import ArtifactStore


@pytest.fixture
def store(tmp_path: Path, redis_server: RedisServer) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        yield store


def damage(store: ArtifactStore, artifact_id: str, part: str) -> None:
    path = Path(store.blobs.url) / blob_name(artifact_id)
    with path.open("rb") as file:
        place = 200 if part == "header" else open_header(file).tensors["tokens"].start + 8
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


FOUND: dict[str, Callable[[ArtifactStore, str], object]] = {
    "an emptied catalog is made again": lambda store, _: (store.catalog.clear(), store.list_if_lost()),
    "the catalog is rebuilt": lambda store, _: store.rebuild(),
    "it is asked for": lambda store, artifact_id: (store.catalog.clear(), store.get(artifact_id)),
    "orphans are listed": lambda store, _: (store.catalog.clear(), store.collect_orphans()),
    "a prompt is looked up": lambda store, _: store.lookup(FINGERPRINT, "default", range(100)),
}


@pytest.mark.parametrize("how", FOUND)
@pytest.mark.parametrize("part", ["header", "tokens"])
def test_damage_that_is_found_without_its_tokens_is_noted(store: ArtifactStore, how: str, part: str) -> None:
    made = store.publish(*sample())
    damage(store, made.id, part)
    FOUND[how](store, made.id)
    noted = Note(Origin.of_manifest(made) if part == "tokens" else None)
    assert store.damaged.all() == {made.id: noted}
    assert store.damaged.get(made.id) == noted
    assert store.damaged.take(made.id) and not store.damaged.take(made.id)
    assert store.damaged.all() == {} and store.damaged.get(made.id) is None


@pytest.mark.parametrize("end", ["stored again", "deleted"])
def test_a_note_ends_with_the_damage(store: ArtifactStore, end: str) -> None:
    made = store.publish(*sample())
    damage(store, made.id, "tokens")
    store.rebuild()
    assert list(store.damaged.all()) == [made.id]
    if end == "deleted":
        store.remove(made.id)
    else:
        store.publish(*sample())
    assert store.damaged.all() == {}


def test_what_has_ended_is_not_missed(store: ArtifactStore) -> None:
    made = store.publish(*sample(), ttl_s=0.2)
    damage(store, made.id, "tokens")
    time.sleep(0.3)
    store.rebuild()
    assert store.damaged.all() == {}


def test_notes_are_bounded_in_number_and_age(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_NOTES", 3)
    ids = [f"{number:064x}" for number in range(5)]
    assert [store.damaged.note(name, Note()) for name in ids] == [True, True, True, False, False]
    assert store.damaged.note(ids[0], Note()) and sorted(store.damaged.all()) == ids[:3]
    monkeypatch.setattr(module, "KEEP_S", 1)
    store.damaged.note(ids[0], Note())
    time.sleep(1.2)
    assert store.damaged.all() == {}


def test_what_it_was_made_from_stays_once_it_is_known(store: ArtifactStore) -> None:
    manifest, _ = sample()
    origin = Origin.of_manifest(manifest)
    for note in (Note(missing=True), Note(origin), Note(), Note(missing=True)):
        store.damaged.note(manifest.id, note)
    assert store.damaged.get(manifest.id) == Note(origin)
    store.damaged.note(manifest.id, Note(origin, missing=True))
    assert store.damaged.get(manifest.id) == Note(origin, missing=True)


def test_what_redis_says_is_not_believed(store: ArtifactStore) -> None:
    key = DAMAGED_KEY.format(store=store.catalog.store_id)
    other = sample(range(50))[0].model_dump_json()
    ids = [f"{number:064x}" for number in range(4)]
    junk: dict[Any, Any] = {
        ids[0]: "{}",
        ids[1]: b"\xff",
        ids[2]: other,
        ids[3]: "",
        "../x": "",
        b"\xff": "1",
    }
    store.catalog.link.call(lambda client: client.hset(key, mapping=junk))
    assert store.damaged.all() == dict.fromkeys(ids, Note())
    store.catalog.link.call(lambda client: (client.delete(key), client.set(key, "x")))
    assert store.damaged.all() == {} and store.damaged.get(ids[0]) is None
    assert not store.damaged.take(ids[0]) and not store.damaged.note(ids[0], Note())
    made: PrefixManifest = store.publish(*sample())
    damage(store, made.id, "tokens")
    with pytest.raises(CorruptArtifact):
        store.pack(made.id)
    assert not store.remove(made.id)
