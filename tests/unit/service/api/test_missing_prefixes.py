"""A prefix whose blob is gone is made again; one that was deleted, or comes back by itself, is not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rivers import DOCUMENT, SETTINGS, publish

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.entry import spec_digest
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_artifacts.token_cache import TokenCache
from xkv_service.api import damage_notes, remaker
from xkv_service.api.backend import NewPrefix
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.prefix_records import PrefixRecords
from xkv_service.api.remaker import Remaker
from xkv_service.engine.messages import PrefixMatch
from xkv_service.modeling.models import LoadedModel


@pytest.fixture(autouse=True)
def notes_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage_notes, "LOOK_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def made(store: ArtifactStore, loaded: LoadedModel) -> PrefixManifest:
    return publish(store, loaded, DOCUMENT)


@pytest.fixture
def prompt(store: ArtifactStore, made: PrefixManifest) -> list[int]:
    return [*store.load(made.id, ("tokens",))[1]["tokens"].tolist(), 70]


class Process:
    """One of the server's HTTP processes, which may have looked the prompt up before."""

    def __init__(self, store: ArtifactStore, loaded: LoadedModel, prompt: list[int] | None = None) -> None:
        self.told: list[NewPrefix] = []
        fingerprint, self.store = loaded.identity.fingerprint, store
        self.finder = PrefixFinder(
            store, loaded.identity, SETTINGS, Remaker(store, fingerprint, self.told.append)
        )
        assert prompt is None or self.ask(prompt) is None

    def ask(self, prompt: list[int], name: str | None = None) -> str | None:
        """The reason of the miss of one that has to read token ids, None where all of it is used."""
        self.store._lookup._tokens = TokenCache()
        asked = self.finder.named(name, prompt, "default") if name else self.finder.find(prompt, "default")
        match, miss = asyncio.run(asked)
        assert isinstance(match, PrefixMatch) == (miss is None)
        return miss and miss.reason


@pytest.fixture
def process(store: ArtifactStore, loaded: LoadedModel, prompt: list[int]) -> Process:
    return Process(store, loaded, prompt)


def blob_of(store: ArtifactStore, made: PrefixManifest) -> Path:
    return Path(store.blobs.url) / blob_name(made.id)


def becomes(true: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


FOUND: dict[str, Callable[[ArtifactStore, str], object]] = {
    "somebody asks for it": lambda store, name: store.get(name),
    "orphans are listed": lambda store, name: store.collect_orphans(),
    "a prompt that holds a part is looked up": lambda store, name: None,
}


@pytest.mark.parametrize("how", FOUND)
@pytest.mark.parametrize("asked", ["found", "named"])
def test_what_is_missed_without_its_tokens_is_made_with_the_next_prompt_that_has_them(
    store: ArtifactStore, loaded: LoadedModel, made: PrefixManifest, prompt: list[int], process: Process,
    monkeypatch: pytest.MonkeyPatch, how: str, asked: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(remaker, "LATE_S", 0.0)
    name = made.id if asked == "named" else None
    blob_of(store, made).unlink()
    FOUND[how](store, made.id)
    part = "missing" if how.startswith("a prompt") else "no_artifact"
    assert [process.ask(prompt[:-2]), process.ask(prompt[:-2])] == [part, "no_artifact"]
    assert not process.told
    assert [process.ask(prompt, name), process.ask(prompt, name)] == [
        "missing",
        "evicted" if name else "no_artifact",
    ]
    (new,) = process.told
    maker = PrefixMaker(store, loaded, ratio=3.0)
    try:
        asyncio.run(maker.create(new))
        becomes(lambda: store.get(made.id))
    finally:
        maker.close()
    assert process.ask(prompt, name) is None
    again = store.load(made.id)[0]
    assert (again.spec, again.document) == (made.spec, made.document) and again.created > made.created


def test_who_asks_right_after_another_lookup_found_it_has_it_made(
    made: PrefixManifest, store: ArtifactStore, prompt: list[int], process: Process,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Though the process has just read what is noted."""
    monkeypatch.setattr(damage_notes, "LOOK_S", 60.0)
    process.ask(prompt)
    blob_of(store, made).unlink()
    assert [process.ask(prompt[:-2]), process.ask(prompt)] == ["missing", "missing"]
    assert len(process.told) == 1


def test_of_two_processes_that_notice_one_has_it_made(
    store: ArtifactStore, loaded: LoadedModel, made: PrefixManifest, prompt: list[int], process: Process
) -> None:
    with ArtifactStore.open(store.blobs.url) as theirs:
        other = Process(theirs, loaded, prompt)
        blob_of(store, made).unlink()
        assert sorted(map(str, (process.ask(prompt), other.ask(prompt)))) == ["missing", "no_artifact"]
        assert len([*process.told, *other.told]) == 1


def test_two_that_ask_have_it_made_once(
    store: ArtifactStore, loaded: LoadedModel, made: PrefixManifest, prompt: list[int], process: Process,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An engine and a lookup, say: both know its tokens."""
    monkeypatch.setattr(remaker, "LATE_S", 0.2)
    blob_of(store, made).unlink()
    assert process.ask(prompt) == "missing"
    makers = [PrefixMaker(store, loaded, ratio=3.0) for _ in range(2)]
    try:
        records = [asyncio.run(maker.create(process.told[0])) for maker in (*makers, makers[0])]
        assert {record.id for record in records} == {made.id}
        becomes(lambda: store.get(made.id))
        first = store.manifest(made.id).created
        time.sleep(1.0)
        assert store.manifest(made.id).created == first
    finally:
        for maker in makers:
            maker.close()


@pytest.mark.parametrize("when", ["before it is made", "when nobody makes it"])
def test_a_blob_that_comes_back_by_itself_is_used_as_it_is(
    store: ArtifactStore, loaded: LoadedModel, made: PrefixManifest, prompt: list[int], process: Process,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, when: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(remaker, "LATE_S", 1.0)
    blob = blob_of(store, made)
    blob.rename(tmp_path / "away")
    assert process.ask(prompt) == "missing"
    if when == "before it is made":
        maker = PrefixMaker(store, loaded, ratio=3.0)
        try:
            assert asyncio.run(maker.create(process.told.pop())).status == "queued"
            (tmp_path / "away").rename(blob)
            becomes(lambda: store.jobs.last("default", made.id) is None)
        finally:
            maker.close()
    else:
        process.told.clear()
        store.damaged.note(made.id, damage_notes.Note(missing=True))
        (tmp_path / "away").rename(blob)
        assert store.list_returned() == 1
    assert process.ask(prompt) is None and store.manifest(made.id).created == made.created
    assert store.damaged.all() == {} and not process.told


@pytest.mark.parametrize("noticed", [False, True])
def test_what_is_deleted_while_it_is_missing_does_not_come_back(
    store: ArtifactStore, made: PrefixManifest, prompt: list[int], process: Process, noticed: bool
) -> None:
    blob_of(store, made).unlink()
    if noticed:
        store.get(made.id)
    assert PrefixRecords(store).delete(["default"], made.id) != noticed  # then it was not listed any more
    assert process.ask(prompt) == "no_artifact" and process.ask(prompt, made.id) == "evicted"
    assert not process.told and store.damaged.all() == {}


def test_what_is_deleted_before_it_is_made_again_is_not_made(
    store: ArtifactStore, loaded: LoadedModel, made: PrefixManifest, prompt: list[int], process: Process,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(remaker, "LATE_S", 0.5)
    blob_of(store, made).unlink()
    assert process.ask(prompt) == "missing"
    maker = PrefixMaker(store, loaded, ratio=3.0)
    try:
        asyncio.run(maker.create(process.told.pop()))
        assert PrefixRecords(store).delete(["default"], made.id)
        becomes(lambda: not maker._unfinished())
        assert store.get(made.id) is None
    finally:
        maker.close()


def test_another_namespace_learns_nothing(
    store: ArtifactStore, made: PrefixManifest, prompt: list[int], process: Process
) -> None:
    blob_of(store, made).unlink()
    for asked in (process.finder.find(prompt, "other"), process.finder.named(made.id, prompt, "other")):
        match, miss = asyncio.run(asked)
        assert match is None and miss is not None and miss.reason in ("no_artifact", "evicted")
    assert not process.told and store.damaged.all() == {} and store.catalog.get(made.id) is not None


@pytest.fixture
def fresh(store: ArtifactStore, loaded: LoadedModel, made: PrefixManifest, prompt: list[int]) -> Process:
    """A process that has looked nothing up, before the blob was gone."""
    process = Process(store, loaded)
    store._lookup._tokens = TokenCache()
    blob_of(store, made).unlink()
    return process


@pytest.mark.parametrize("found_by", ["its own lookup", "somebody else"])
def test_a_process_that_has_never_read_it_has_it_made_again(
    store: ArtifactStore, made: PrefixManifest, prompt: list[int], fresh: Process, found_by: str
) -> None:
    """The catalog says what it was made from."""
    if found_by == "somebody else":
        store.get(made.id)
    assert fresh.ask(prompt) == "missing"
    (new,) = fresh.told
    assert new.spec is not None and new.spec.canonical() == made.spec
    assert (new.replaces, new.name, new.sha256) == (made.id, made.document.uri, made.document.sha256)


@pytest.mark.parametrize("said", [None, "{", "[]", '{"ratio": 4.0}'])
def test_where_it_is_not_known_what_it_was_made_from_the_log_says_so(
    store: ArtifactStore, made: PrefixManifest, prompt: list[int], fresh: Process, said: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The entry is of before, or what Redis says cannot be."""
    start = f"xkv:1:{store.catalog.store_id}:"
    if said is None:
        store.catalog.link.call(lambda client: client.hdel(f"{start}entry:{made.id}", "spec"))
    else:
        store.catalog.link.call(lambda client: client.hset(f"{start}specs", spec_digest(made.spec), said))
    with caplog.at_level(logging.WARNING):
        assert fresh.ask(prompt) == "missing"
    why = "no prompt holds all of it" if said and "ratio" in said else "what it was made from is not known"
    assert (
        f"artifact {made.id[:12]} is not made again, {why}: "
        f"the file of artifact {made.id[:12]} is gone from the store, found by a lookup"
    ) in caplog.messages
    assert not fresh.told and fresh.finder.counters == {"remakes_impossible": 1}
    assert list(store.damaged.all()) == [made.id]  # another process may know
