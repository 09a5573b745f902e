"""A damaged artifact is made again as it was, whoever found the damage, or not at all."""

from __future__ import annotations

import asyncio
import queue
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from measured import calibrated
from rivers import DOCUMENT, SETTINGS, publish

from xkv_artifacts.checked_file import open_header
from xkv_artifacts.errors import CorruptArtifact
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.origin import Origin
from xkv_artifacts.reports import Match
from xkv_artifacts.retention import NO_PROMISE
from xkv_artifacts.store import ArtifactStore
from xkv_artifacts.token_cache import TokenCache
from xkv_service.api import damage_notes
from xkv_service.api.backend import NewPrefix
from xkv_service.api.matching import Found, PrefixFinder
from xkv_service.api.metrics import Metrics
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.prefix_records import PrefixRecords
from xkv_service.api.remaker import Remaker
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.storage import load_calibration, save_calibration
from xkv_service.engine.engine import Engine
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import (
    Delta,
    EngineState,
    Event,
    Finished,
    GenerationRequest,
    PrefixMatch,
    Started,
)
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.settings import GenerationSettings
from xkv_service.spec import CompressionSpec
from xkv_workers.serving.remakes import Remakes

SAMPLE = [ProbedPrefix.of_text("text", range(80))]
DAMAGE = LoadFailure("corrupt", "it is damaged", "a checksum is wrong")


def tokens_of(store: ArtifactStore, manifest: PrefixManifest) -> list[int]:
    tokens: list[int] = store.load(manifest.id, ("tokens",))[1]["tokens"].tolist()
    return tokens


def asking(prompt: list[int], match: PrefixMatch | None) -> GenerationRequest:
    return GenerationRequest(
        "1", tuple(prompt), GenerationSettings(max_new_tokens=40), namespace="asker", match=match
    )


def found(finder: PrefixFinder, prompt: list[int], namespace: str = "default") -> PrefixMatch:
    match, _ = asyncio.run(finder.find(prompt, namespace))
    assert match is not None
    return match


@pytest.mark.parametrize("fault", ["damaged", "missing"])
def test_damage_that_a_prefetch_finds_is_mended(tmp_path: Path, loaded: LoadedModel, fault: str) -> None:
    """Nobody waits for the load. The artifact has ranks instead of a ratio, and the public namespace."""
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = publish(store, loaded, DOCUMENT, SETTINGS.public_namespace)
        prompt = tokens_of(store, made)  # the prompt may be the prefix, no more
        match = found(PrefixFinder(store, loaded.identity, SETTINGS), prompt, "asker")
        damage(store, made.id, -100) if fault == "damaged" else lose(store, made.id)
        maker = PrefixMaker(store, loaded, ratio=3.0)
        remaker = Remaker(store, loaded.identity.fingerprint, lambda new: asyncio.run(maker.create(new)))
        remakes = Remakes(remaker)
        pool = PrefixPool(
            loaded.model,
            store,
            fingerprint=loaded.identity.fingerprint,
            on_lost=remakes.lost,
        )
        try:
            remakes.note(asking(prompt, match))
            pool.prefetch(made.id)
            end = time.monotonic() + 240
            while not remaker.counters or (entry := store.get(made.id)) is None:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert entry.namespace == SETTINGS.public_namespace
            again = store.load(made.id)[0]
            assert (again.spec, again.document) == (made.spec, made.document)
            assert list(store.blobs.ids()) == [made.id]
            assert remaker.counters == {"remakes_asked": 1}
            counters = pool.state().counters
            assert [counters.get(name, 0) for name in ("damaged", "missing")] == [
                fault == "damaged",
                fault == "missing",
            ]
        finally:
            pool.close()
            maker.close()


def blob_of(store: ArtifactStore, name: str) -> Path:
    (blob,) = Path(store.blobs.url).glob(f"*/*/{name}.safetensors")  # not in quarantine
    return blob


def damage(store: ArtifactStore, name: str, place: int) -> None:
    content = bytearray(blob_of(store, name).read_bytes())
    content[place] ^= 1
    blob_of(store, name).write_bytes(content)


def lose(store: ArtifactStore, name: str) -> None:
    blob_of(store, name).unlink()


def answered(engine: Engine, request: GenerationRequest) -> tuple[Started, tuple[int, ...]]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request, events.put)
    started, end = events.get(timeout=240), events.get(timeout=240)
    while isinstance(end, Delta):
        end = events.get(timeout=240)
    assert isinstance(started, Started) and isinstance(end, Finished), (started, end)
    return started, end.token_ids


def becomes(true: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["found", "named"])
@pytest.mark.parametrize("fault", ["corrupt", "missing"])
def test_damage_that_a_lookup_finds_is_mended(
    tmp_path: Path, loaded: LoadedModel, how: str, fault: str
) -> None:
    """By what an earlier lookup read, and the tokens of the prompt at hand."""
    told: list[NewPrefix] = []
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = publish(store, loaded, DOCUMENT)
        prompt = [*tokens_of(store, made), 70]
        fingerprint = loaded.identity.fingerprint
        finder = PrefixFinder(store, loaded.identity, SETTINGS, Remaker(store, fingerprint, told.append))
        fresh = PrefixFinder(store, loaded.identity, SETTINGS, Remaker(store, fingerprint, told.append))
        assert found(finder, prompt).artifact_id == made.id
        store._lookup._tokens = TokenCache()  # as where there are too many artifacts to keep
        damage(store, made.id, 100) if fault == "corrupt" else lose(store, made.id)

        def ask(finder: PrefixFinder) -> Found:
            asked = (
                finder.find(prompt, "default") if how == "found" else finder.named(made.id, prompt, "default")
            )
            return asyncio.run(asked)

        match, miss = ask(finder)
        assert match is None and miss is not None and miss.reason == fault
        assert finder.counters == {"remakes_asked": 1}
        maker = PrefixMaker(store, loaded, ratio=3.0)
        try:
            asyncio.run(maker.create(told.pop()))
            becomes(lambda: store.get(made.id))
        finally:
            maker.close()
        assert found(finder, prompt).artifact_id == made.id
        store._lookup._tokens = TokenCache()
        damage(store, made.id, 100) if fault == "corrupt" else lose(store, made.id)
        match, miss = ask(
            fresh
        )  # it has never read it: of what is missing the catalog says all that it takes
        assert miss is not None and miss.reason == fault
        asked = fault == "missing"
        assert len(told) == asked and fresh.counters == {f"remakes_{'asked' if asked else 'impossible'}": 1}


def test_a_loss_that_another_finds_during_a_lookup_is_mended_by_who_holds_the_tokens(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's prompt goes on otherwise, and this lookup has read the list from before."""
    told: list[NewPrefix] = []
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = publish(store, loaded, DOCUMENT)
        ids, fingerprint = tokens_of(store, made), loaded.identity.fingerprint
        finder = PrefixFinder(store, loaded.identity, SETTINGS, Remaker(store, fingerprint, told.append))
        other = PrefixFinder(store, loaded.identity, SETTINGS, Remaker(store, fingerprint, told.append))
        found(finder, [*ids, 70])  # what it knows of the notes is new
        store._lookup._tokens = TokenCache()
        lose(store, made.id)
        match = store._lookup._match

        def late(*args: Any, **options: Any) -> Match:
            monkeypatch.undo()
            assert asyncio.run(other.find([*ids[:100], 70], "default"))[0] is None
            return match(*args, **options)

        monkeypatch.setattr(store._lookup, "_match", late)
        served, miss = asyncio.run(finder.find([*ids, 70], "default"))
        assert served is None and miss is not None and miss.reason == "missing"
        (new,) = told
        assert new.replaces == made.id and list(new.token_ids) == ids


@pytest.mark.parametrize("how", ["found", "named"])
@pytest.mark.parametrize("part", ["header", "tokens"])
@pytest.mark.parametrize("known", ["by who read it before", "by its header"])
def test_damage_that_is_found_without_a_prompt_is_mended_with_the_next_one(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, how: str, part: str, known: str
) -> None:
    """A catalog was emptied, and made again."""
    monkeypatch.setattr(damage_notes, "LOOK_S", 0.0)
    told: list[NewPrefix] = []
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = publish(store, loaded, DOCUMENT)
        ids = tokens_of(store, made)
        prompt, fingerprint = [*ids, 70], loaded.identity.fingerprint
        finder = PrefixFinder(store, loaded.identity, SETTINGS, Remaker(store, fingerprint, told.append))
        if known == "by who read it before":
            found(finder, prompt)
        with store.blobs.open(made.id) as file:
            place = 100 if part == "header" else open_header(file).tensors["tokens"].start
        damage(store, made.id, place)
        store._lookup._tokens = TokenCache()
        store.catalog.clear()
        assert store.list_if_lost() is not None

        def ask(prompt: list[int], namespace: str = "default") -> str:
            asked = (
                finder.find(prompt, namespace) if how == "found" else finder.named(made.id, prompt, namespace)
            )
            match, miss = asyncio.run(asked)
            assert match is None and miss is not None
            return miss.reason

        none = "no_artifact" if how == "found" else "evicted"
        assert ask([*ids[:-1], 70, 70]) == ask(ids[:-1]) == ask(prompt, "other") == none
        assert not told and finder.counters == {}
        if part == "header" and known == "by its header":
            assert ask(prompt) == none and not told
            return
        assert [ask(prompt), ask(prompt)] == ["corrupt", none]
        (new,) = told
        assert finder.counters == {"remakes_asked": 1}
        maker = PrefixMaker(store, loaded, ratio=3.0)
        try:
            asyncio.run(maker.create(new))
            becomes(lambda: store.get(made.id))
        finally:
            maker.close()
        assert found(finder, prompt).artifact_id == made.id
        assert store.manifest(made.id).document == made.document


@pytest.mark.parametrize("header", [False, True])
def test_what_was_deleted_after_its_damage_is_not_made_again(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, header: bool
) -> None:
    """But with its header it is lost whose it was, and nobody may take the note of another's."""
    monkeypatch.setattr(damage_notes, "LOOK_S", 0.0)
    told: list[NewPrefix] = []
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = publish(store, loaded, DOCUMENT)
        prompt, fingerprint = [*tokens_of(store, made), 70], loaded.identity.fingerprint
        finder = PrefixFinder(store, loaded.identity, SETTINGS, Remaker(store, fingerprint, told.append))
        found(finder, prompt)
        tokens = open_header(BytesIO(blob_of(store, made.id).read_bytes())).tensors["tokens"].start
        damage(store, made.id, 100 if header else tokens)
        store.rebuild()
        records = PrefixRecords(store)
        assert not records.delete(["another"], made.id) and made.id in store.damaged.all()
        assert not records.delete(["default"], made.id)  # it is not there any more
        assert asyncio.run(finder.find(prompt, "default"))[0] is None
        assert bool(told) is header and store.damaged.all() == {}


@pytest.mark.parametrize("there", ["nothing", "no end", "an earlier end"])
def test_a_pin_and_an_end_go_to_the_other_id(tmp_path: Path, loaded: LoadedModel, there: str) -> None:
    """Of a prefix that is made again with another calibration."""
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        theirs, mine = (
            load_calibration(
                store, save_calibration(store, calibrated(loaded.model, size), loaded.identity, SAMPLE).id
            )
            for size in (2, 4)
        )
        first = PrefixMaker(store, loaded, calibration=theirs)
        new = NewPrefix("default", list(range(5, 205)), "a", "0" * 64, ratio=2.0, pinned=True, ttl_s=900.0)
        old = asyncio.run(first.create(new)).id
        becomes(lambda: store.get(old))
        first.close()
        ends = store.promised(old)[0].expires
        assert ends is not None
        told: list[NewPrefix] = []
        remaker = Remaker(store, loaded.identity.fingerprint, told.append)
        origin = Origin("default", store.manifest(old).spec, 200, "a", "0" * 64)
        damage(store, old, -100)
        with pytest.raises(CorruptArtifact):
            store.load(old)
        remaker.ask(old, origin, array("i", range(5, 206)), "damage")
        maker = PrefixMaker(store, loaded, calibration=mine)
        try:
            if there != "nothing":
                ttl_s = None if there == "no end" else 60.0
                known = asyncio.run(maker.create(replace(new, pinned=False, ttl_s=ttl_s))).id
                becomes(lambda: store.get(known))
            again = asyncio.run(maker.create(told.pop())).id
            assert again != old
            becomes(lambda: store.get(again))
            becomes(lambda: store.promised(old)[0] == NO_PROMISE)  # it was, and is not stored
        finally:
            maker.close()
        promised = store.promised(again)[0]
        assert promised.pinned
        if there == "no end":
            assert promised.expires is None
        else:  # from when it was published on
            assert promised.expires is not None and ends - 2 < promised.expires < ends + 240


def strict(made: Calibration) -> Calibration:
    return replace(made, figures={**made.figures, "thresholds": [{"ratio": 8.0, "kl": 0.0125}]})


def test_what_was_made_without_a_calibration_is_made_again_without(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    """By a server that has one."""
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        mine = load_calibration(
            store, save_calibration(store, strict(calibrated(loaded.model, 2)), loaded.identity, SAMPLE).id
        )
        maker = PrefixMaker(store, loaded, calibration=mine)
        new = NewPrefix("default", list(range(5, 205)), "a", "0" * 64, spec=CompressionSpec(ratio=2.0))
        try:
            made = asyncio.run(maker.create(new)).id
            becomes(lambda: store.get(made))
        finally:
            maker.close()
        assert store.manifest(made).spec.get("calibration") is None


@pytest.mark.parametrize("calibration", ["the same", "another", "none"])
@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_prefix_whose_calibration_is_damaged_is_made_over_other_bases(
    tmp_path: Path, loaded: LoadedModel, fault: str, calibration: str
) -> None:
    """By a server that has in memory the one that is damaged, a newer one, or none."""
    fingerprint, told = loaded.identity.fingerprint, list[NewPrefix]()
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        lost, newer = (
            load_calibration(store, save_calibration(store, strict(made), loaded.identity, SAMPLE).id)
            for made in (calibrated(loaded.model, size) for size in (2, 4))
        )
        makers = {"the same": lost, "another": newer, "none": None}
        first = PrefixMaker(store, loaded, calibration=lost)
        maker = PrefixMaker(store, loaded, calibration=makers[calibration])
        new = NewPrefix("default", list(range(5, 205)), "a", "0" * 64, ratio=2.0, pinned=True, ttl_s=900.0)
        old = asyncio.run(first.create(new)).id
        becomes(lambda: store.get(old))
        first.close()
        spec = CompressionSpec.from_canonical(store.manifest(old).spec)
        assert spec.basis == "calibrated" and store.manifest(old).fidelity.kl_limit == 0.0125
        record = PrefixRecords(store).get(["default"], old)
        assert record is not None and record.kl is not None and record.kl_limit == 0.0125
        if fault == "damaged":
            damage(store, lost.id, -100)
        else:
            store.calibrations.remove(lost.id)
        remaker = Remaker(store, fingerprint, told.append)
        remakes = Remakes(remaker)
        pool = PrefixPool(
            loaded.model,
            store,
            fingerprint=fingerprint,
            rates=LoadingRates(10.0),  # seconds a token: whatever can be loaded is
            on_lost=remakes.lost,
        )
        finder = PrefixFinder(store, loaded.identity, SETTINGS)
        prompt = [*new.token_ids, 70]
        with Engine(loaded, EngineSettings(tail_bytes=0), pool) as engine:
            request = asking(prompt, found(finder, prompt))
            remakes.note(request)
            started, tokens = answered(engine, request)
            assert started.miss is not None and started.miss.reason == "corrupt"
            assert started.cached_tokens == 0
            assert tokens == answered(engine, asking(prompt, None))[1]
            becomes(lambda: told)
            assert asyncio.run(finder.find(prompt, "default"))[0] is None  # it is not found any more
            assert store.blobs.exists(old)  # but nothing is lost
            assert remaker.counters == {"remakes_asked": 1}
            try:
                again = asyncio.run(maker.create(told.pop())).id
                becomes(lambda: store.get(again))
                assert asyncio.run(maker.create(replace(new, spec=spec))).id == again
            finally:
                maker.close()
            assert again != old
            manifest, entry = store.manifest(again), store.get(again)
            assert manifest.spec["ratio"] == 2.0 and entry is not None
            assert entry.pinned and entry.expires is not None
            basis = "calibrated" if calibration == "another" else "document"
            assert manifest.spec.get("basis", "document") == basis
            request = asking(prompt, found(finder, prompt))
            becomes(lambda: answered(engine, request)[0].artifact_id == again)  # once it is in memory
        pool.close()


def test_a_prompt_that_holds_a_part_makes_nothing(
    store: ArtifactStore, loaded: LoadedModel, stored: PrefixManifest, finder: PrefixFinder
) -> None:
    ids, told = tokens_of(store, stored), list[NewPrefix]()
    remaker = Remaker(store, loaded.identity.fingerprint, told.append)
    remakes = Remakes(remaker)
    for prompt in (ids[:100], [*ids[:80], 70, *ids[81:]]):
        remakes.note(asking(prompt, found(finder, prompt)))
    remakes.lost(stored.id, DAMAGE)
    assert not told and remaker.counters == {"remakes_impossible": 1}


def test_one_remake_a_damage(
    store: ArtifactStore, loaded: LoadedModel, stored: PrefixManifest, finder: PrefixFinder
) -> None:
    prompt, told = [*tokens_of(store, stored), 70], list[NewPrefix]()
    request = asking(prompt, found(finder, prompt))
    remaker = Remaker(store, loaded.identity.fingerprint, told.append)
    remakes = Remakes(remaker)
    for _ in range(2):
        remakes.note(request)
        remakes.note(request)
        remakes.lost(stored.id, DAMAGE)
        remakes.lost(stored.id, DAMAGE)
    assert remaker.counters == {"remakes_asked": 2, "remakes_impossible": 2}
    assert [(new.namespace, list(new.token_ids), new.name) for new in told] == [
        ("default", prompt[:-1], "river.txt")
    ] * 2


@pytest.mark.parametrize(
    "other", [{"namespace": "else"}, {"spec": {"ratio": 2.0}}, {"spec": {"rank": 1}}, {"namespace": "/"}]
)
def test_what_would_make_another_artifact_makes_none(
    store: ArtifactStore, loaded: LoadedModel, stored: PrefixManifest, finder: PrefixFinder,
    other: dict[str, object],
) -> None:  # fmt: skip
    prompt, told = [*tokens_of(store, stored), 70], list[NewPrefix]()
    match = found(finder, prompt)
    assert match.origin is not None
    remaker = Remaker(store, loaded.identity.fingerprint, told.append)
    remakes = Remakes(remaker)
    remakes.note(asking(prompt, replace(match, origin=replace(match.origin, **other))))
    remakes.lost(stored.id, DAMAGE)
    assert not told and remaker.counters == {"remakes_impossible": 1}


def test_what_is_remembered_is_bounded(store: ArtifactStore) -> None:
    remakes = Remakes(Remaker(store, "0" * 64, print), most_tokens=250)
    origin = Origin("default", {}, 100, "a", "0" * 64)
    for name in ("a", "b", "a", "c"):
        remakes.note(asking([1] * 101, PrefixMatch(name, 100, origin)))
    assert list(remakes._sources) == ["a", "c"] and remakes._tokens == 200


def test_failures_of_lookups_and_engines_are_added_up() -> None:
    metrics = Metrics()
    metrics.lost_at_lookup.update(["corrupt", "missing", "missing", "no_artifact"])
    state = EngineState(0, 0, 0, 0, 0, (), {"prefixes_damaged": 2.0, "prefixes_missing": 3.0})
    exposed = metrics.exposition([state])
    assert b"xkv_verification_failures_total 3.0" in exposed and b"xkv_missing_blobs_total 5.0" in exposed
    without = metrics.exposition([], {"remakes_asked": 2.0})
    assert b"xkv_lookup_remakes_asked_total 2.0" in without
    assert b"xkv_verification_failures_total " not in without, "a counter that falls would begin anew"
