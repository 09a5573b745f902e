"""A damaged artifact is made again as it was, whoever found the damage, or not at all."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rivers import DOCUMENT, SETTINGS, publish

from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import NewPrefix
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.metrics import Metrics
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.messages import EngineState, GenerationRequest, Origin, PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.settings import GenerationSettings
from xkv_workers.serving.remakes import Remakes

DAMAGE = LoadFailure("corrupt", "a checksum is wrong")


def tokens_of(store: ArtifactStore, manifest: PrefixManifest) -> list[int]:
    tokens: list[int] = store.load(manifest.id, ("tokens",))[1]["tokens"].tolist()
    return tokens


def asking(prompt: list[int], match: PrefixMatch | None) -> GenerationRequest:
    return GenerationRequest("1", tuple(prompt), GenerationSettings(), namespace="asker", match=match)


def found(finder: PrefixFinder, prompt: list[int], namespace: str = "default") -> PrefixMatch:
    match, _ = asyncio.run(finder.find(prompt, namespace))
    assert match is not None
    return match


def test_damage_that_a_prefetch_finds_is_mended(tmp_path: Path, loaded: LoadedModel) -> None:
    """Nobody waits for the load. The artifact has ranks instead of a ratio, and the public namespace."""
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = publish(store, loaded, DOCUMENT, SETTINGS.public_namespace)
        prompt = tokens_of(store, made)  # the prompt may be the prefix, no more
        match = found(PrefixFinder(store, loaded.identity.fingerprint, SETTINGS), prompt, "asker")
        (blob,) = (tmp_path / "store").rglob(f"{made.id}.safetensors")
        content = bytearray(blob.read_bytes())
        content[-100] ^= 1
        blob.write_bytes(content)
        maker = PrefixMaker(store, loaded, ratio=3.0)
        remakes = Remakes(loaded.identity.fingerprint, lambda new: asyncio.run(maker.create(new)))
        pool = PrefixPool(
            loaded.model,
            store,
            fingerprint=loaded.identity.fingerprint,
            on_corrupt=remakes.damaged,
        )
        try:
            remakes.note(asking(prompt, match))
            pool.prefetch(made.id)
            end = time.monotonic() + 240
            while not remakes.counters or (entry := store.get(made.id)) is None:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert entry.namespace == SETTINGS.public_namespace
            again = store.load(made.id)[0]
            assert (again.spec, again.document) == (made.spec, made.document)
            assert list(store.blobs.ids()) == [made.id]
            assert remakes.counters == {"remakes_asked": 1}
            assert pool.state().counters["damaged"] == 1
        finally:
            pool.close()
            maker.close()


def test_a_prompt_that_holds_a_part_makes_nothing(
    store: ArtifactStore, loaded: LoadedModel, stored: PrefixManifest, finder: PrefixFinder
) -> None:
    ids, told = tokens_of(store, stored), list[NewPrefix]()
    remakes = Remakes(loaded.identity.fingerprint, told.append)
    for prompt in (ids[:100], [*ids[:80], 70, *ids[81:]]):
        remakes.note(asking(prompt, found(finder, prompt)))
    remakes.damaged(stored.id, DAMAGE)
    assert not told and remakes.counters == {"remakes_impossible": 1}


def test_one_remake_a_damage(
    store: ArtifactStore, loaded: LoadedModel, stored: PrefixManifest, finder: PrefixFinder
) -> None:
    prompt, told = [*tokens_of(store, stored), 70], list[NewPrefix]()
    request = asking(prompt, found(finder, prompt))
    remakes = Remakes(loaded.identity.fingerprint, told.append)
    for _ in range(2):
        remakes.note(request)
        remakes.note(request)
        remakes.damaged(stored.id, DAMAGE)
        remakes.damaged(stored.id, DAMAGE)
    assert remakes.counters == {"remakes_asked": 2, "remakes_impossible": 2}
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
    remakes = Remakes(loaded.identity.fingerprint, told.append)
    remakes.note(asking(prompt, replace(match, origin=replace(match.origin, **other))))
    remakes.damaged(stored.id, DAMAGE)
    assert not told and remakes.counters == {"remakes_impossible": 1}


def test_what_is_remembered_is_bounded() -> None:
    remakes = Remakes("0" * 64, print, most_tokens=250)
    origin = Origin("default", {}, 100, "a", "0" * 64)
    for name in ("a", "b", "a", "c"):
        remakes.note(asking([1] * 101, PrefixMatch(name, 100, origin)))
    assert list(remakes._sources) == ["a", "c"] and remakes._tokens == 200


def test_failures_of_lookups_and_engines_are_added_up() -> None:
    metrics = Metrics()
    metrics.damaged_at_lookup += 1
    state = EngineState(0, 0, 0, 0, 0, (), {"prefixes_damaged": 2.0})
    assert b"xkv_verification_failures_total 3.0" in metrics.exposition([state])
