"""Which stored prefix a prompt is served from, and the reason when it is none, or not all of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from families import tiny_model as family_model
from redis_server import RedisServer
from rivers import DOCUMENT, SETTINGS, publish
from transformers import PreTrainedModel

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, ModelIdentity, PrefixManifest
from xkv_artifacts.origin import Origin
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, compress
from xkv_service.api.errors import APIError
from xkv_service.api.matching import Found, PrefixFinder
from xkv_service.engine.breaker import Breaker
from xkv_service.engine.messages import Miss, PrefixMatch
from xkv_service.modeling.models import LoadedModel


def find(finder: PrefixFinder, prompt: list[int], namespace: str = "default") -> Found:
    return asyncio.run(finder.find(prompt, namespace))


def named(finder: PrefixFinder, name: str, prompt: list[int], namespace: str = "default") -> Found:
    return asyncio.run(finder.named(name, prompt, namespace))


def reason(found: Found) -> str | None:
    assert found[0] is None
    return found[1] and found[1].reason


@pytest.fixture(scope="module")
def ids(store: ArtifactStore, stored: PrefixManifest) -> list[int]:
    tokens: list[int] = store.load(stored.id, ("tokens",))[1]["tokens"].tolist()
    return tokens


def test_the_whole_prefix(finder: PrefixFinder, stored: PrefixManifest, ids: list[int]) -> None:
    assert find(finder, [*ids, 70]) == (PrefixMatch(stored.id, len(ids)), None)
    assert named(finder, stored.id, [*ids, 70]) == (PrefixMatch(stored.id, len(ids)), None)


def test_an_artifact_is_opened_once(
    store: ArtifactStore,
    loaded: LoadedModel,
    stored: PrefixManifest,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an object store each time costs two requests, before anything can be loaded."""
    opened, read = [], store.blobs.open
    monkeypatch.setattr(store.blobs, "open", lambda name: opened.append(name) or read(name))
    finder = PrefixFinder(ArtifactStore(store.blobs, store.catalog), loaded.identity, SETTINGS)
    for question in (70, 71):
        assert find(finder, [*ids, question]) == (PrefixMatch(stored.id, len(ids)), None)
    assert opened == [stored.id]
    finder.close()


def test_a_prompt_that_is_the_prefix_leaves_one_token_to_compute(
    finder: PrefixFinder, stored: PrefixManifest, ids: list[int]
) -> None:
    assert find(finder, ids) == (PrefixMatch(stored.id, len(ids) - 1), None)
    assert named(finder, stored.id, ids) == (PrefixMatch(stored.id, len(ids) - 1), None)


def test_a_prompt_that_ends_inside_the_prefix(
    finder: PrefixFinder, stored: PrefixManifest, ids: list[int]
) -> None:
    assert find(finder, ids[:100]) == (PrefixMatch(stored.id, 99), None)


def test_a_prompt_that_departs_from_the_prefix(
    finder: PrefixFinder, stored: PrefixManifest, ids: list[int]
) -> None:
    match, miss = find(finder, [*ids[:80], 70, *ids[81:]])
    assert match == PrefixMatch(stored.id, 80)
    assert miss is not None and miss.reason == "diverges"
    assert miss.detail.endswith(f"share 80 of its {len(ids)} tokens")


def test_too_little_is_shared(finder: PrefixFinder, ids: list[int]) -> None:
    assert reason(find(finder, [*ids[:63], 70, 70])) == "no_artifact"
    assert reason(find(finder, [*ids[:64]])) == "no_artifact"  # one of them must be computed
    assert find(finder, [*ids[:64], 70])[0] is not None
    assert reason(find(finder, [70, 71])) == "no_artifact"


def test_a_prefix_less_faithful_than_is_accepted(
    store: ArtifactStore, loaded: LoadedModel, stored: PrefixManifest, ids: list[int]
) -> None:
    least = stored.fidelity.top1_agreement
    for asked, found in ((least, None), (min(1.0, least + 0.01), "low_fidelity")):
        strict = PrefixFinder(store, loaded.identity, replace(SETTINGS, min_fidelity=asked))
        match, miss = find(strict, [*ids, 70])
        assert (match is None) == (found is not None)
        assert (miss and miss.reason) == found


def test_namespaces_see_their_own_and_the_public_one(tmp_path: Path, loaded: LoadedModel) -> None:
    with ArtifactStore.open(str(tmp_path)) as store:
        finder = PrefixFinder(store, loaded.identity, SETTINGS)
        theirs = publish(store, loaded, DOCUMENT, "theirs")
        prompt = [*store.load(theirs.id, ("tokens",))[1]["tokens"].tolist(), 70]
        assert reason(find(finder, prompt, "mine")) == "no_artifact"
        assert reason(named(finder, theirs.id, prompt, "mine")) == "evicted"
        absent = named(finder, "0" * 64, prompt, "mine")[1]
        hidden = named(finder, theirs.id, prompt, "mine")[1]
        assert absent is not None and hidden is not None
        assert hidden.detail.replace(theirs.id[:12], "0" * 12) == absent.detail
        public = publish(store, loaded, DOCUMENT[:80], "public")
        match, miss = find(finder, prompt, "mine")
        assert match == PrefixMatch(public.id, match.tokens if match else 0)
        longer = find(finder, prompt, "theirs")[0]
        assert longer == PrefixMatch(theirs.id, theirs.tokens)
        assert named(finder, public.id, prompt, "theirs")[0] == match
        assert store.remove(theirs.id)
        assert find(finder, prompt, "theirs")[0] == match
        assert reason(named(finder, theirs.id, prompt, "theirs")) == "evicted"


def test_a_named_prefix_that_the_prompt_does_not_begin_with(
    finder: PrefixFinder, stored: PrefixManifest, ids: list[int]
) -> None:
    with pytest.raises(APIError, match=f"share 80 of its {len(ids)} tokens") as caught:
        named(finder, stored.id, [*ids[:80], 70, 70])
    assert (caught.value.status, caught.value.param) == (400, "prefix_id")
    assert caught.value.message.endswith("(send the prefix's own text first, or leave prefix_id out)")


def test_a_named_prefix_of_another_model(
    store: ArtifactStore, stored: PrefixManifest, ids: list[int], other_revision: ModelIdentity
) -> None:
    match, miss = named(PrefixFinder(store, other_revision, SETTINGS), stored.id, [*ids, 70])
    made_with = "was made with another model (tiny: another dtype (float32, not bfloat16), other weights)"
    assert (match, miss) == (None, Miss("other_model", f"prefix {stored.id[:12]} {made_with}"))
    old = other_revision.model_copy(update={"parts": None, "dtype": "float32"})
    match, miss = named(PrefixFinder(store, old, SETTINGS), stored.id, [*ids, 70])
    assert miss is not None and miss.detail.endswith("was made with another model (tiny)")


def test_a_damaged_prefix(tmp_path: Path, loaded: LoadedModel) -> None:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        manifest = publish(store, loaded, DOCUMENT)
        prompt = [*store.load(manifest.id, ("tokens",))[1]["tokens"].tolist(), 70]
        (blob,) = (tmp_path / "store").rglob(f"{manifest.id}.safetensors")
        content = bytearray(blob.read_bytes())
        content[100] ^= 1  # in the header
        blob.write_bytes(content)
        finder = PrefixFinder(store, loaded.identity, SETTINGS)
        assert reason(named(finder, manifest.id, prompt)) == "corrupt"
        assert reason(find(finder, prompt)) == "no_artifact"  # it was dropped


def test_damage_that_the_lookup_finds_is_told(tmp_path: Path, loaded: LoadedModel) -> None:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        long, short = publish(store, loaded, DOCUMENT * 2), publish(store, loaded, DOCUMENT)
        prompt = [*store.load(long.id, ("tokens",))[1]["tokens"].tolist(), 70]
        (blob,) = (tmp_path / "store").rglob(f"{long.id}.safetensors")
        content = bytearray(blob.read_bytes())
        content[100] ^= 1
        blob.write_bytes(content)
        finder = PrefixFinder(store, loaded.identity, SETTINGS)
        match, miss = find(finder, prompt)
        assert match is not None and match.artifact_id == short.id
        assert miss is not None and (miss.reason, long.id[:12] in miss.detail) == ("corrupt", True)
        match, miss = find(finder, prompt)  # it was dropped
        assert match is not None and (miss is None or miss.reason == "diverges")


def test_what_makes_a_prefix_again_comes_with_a_prompt_that_holds_all_of_it(
    finder: PrefixFinder, stored: PrefixManifest, ids: list[int]
) -> None:
    origin = Origin(stored.namespace, stored.spec, len(ids), "river.txt", "0" * 64)
    for prompt, expected in (([*ids, 70], origin), (ids, origin), (ids[:-1], None), ([*ids[:-1], 70], None)):
        match, _ = find(finder, prompt)
        assert match is not None and match.origin == expected


GEMMA = ModelIdentity(fingerprint="a" * 64, name="tiny", architecture="Gemma3", dtype="float32")


@pytest.fixture(scope="module")
def gemma() -> PreTrainedModel:
    """A model whose prefixes serve whole or not at all: it has sliding windows."""
    return family_model("gemma3", vocab_size=260, max_position_embeddings=1024)


def publish_whole(store: ArtifactStore, model: PreTrainedModel, tokens: list[int]) -> str:
    factors = compress(model, tokens, CompressionSpec(rank_k=24, rank_v=24))
    assert factors.whole_only
    fields = factors.manifest_fields()
    manifest = PrefixManifest(
        id=artifact_id(GEMMA.fingerprint, "default", tokens, fields["spec"]),
        model=GEMMA,
        namespace="default",
        document=DocumentRef(uri="a", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    return store.publish(manifest, factors.to_tensors()).id


def test_a_prefix_that_can_be_used_whole_only(tmp_path: Path, gemma: PreTrainedModel) -> None:
    with ArtifactStore.open(str(tmp_path)) as store:
        tokens = torch.randint(3, 250, (150,), generator=torch.Generator().manual_seed(0)).tolist()
        name = publish_whole(store, gemma, tokens)
        finder = PrefixFinder(store, GEMMA, SETTINGS)
        assert find(finder, [*tokens, 5]) == (PrefixMatch(name, 150), None)
        for prompt in ([*tokens[:100], 251, 251], tokens, tokens[:120]):
            assert reason(find(finder, prompt)) == "diverges"


def test_a_shorter_prefix_that_fits_whole_is_found_behind_a_longer_one_that_does_not(
    tmp_path: Path, gemma: PreTrainedModel
) -> None:
    with ArtifactStore.open(str(tmp_path)) as store:
        tokens = torch.randint(3, 250, (230,), generator=torch.Generator().manual_seed(0)).tolist()
        system = publish_whole(store, gemma, tokens[:80])
        for other in (1, 2, 255):  # share 170 tokens with the prompt, and stand around it in the index
            publish_whole(store, gemma, [*tokens[:170], *[other] * 30])
        finder = PrefixFinder(store, GEMMA, replace(SETTINGS, min_fidelity=0.0))
        match, miss = find(finder, tokens)
        assert match == PrefixMatch(system, 80)
        assert miss is not None and miss.reason == "diverges"
        longer = publish_whole(store, gemma, tokens[:140])
        assert find(finder, tokens)[0] == PrefixMatch(longer, 140)
        assert reason(find(finder, [*tokens[:79], 251])) == "diverges"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize(("way", "patience_s"), [("killed", 0.0), ("killed", 30.0), ("frozen", 0.0)])
def test_a_redis_that_is_down_costs_one_request_its_patience(
    tmp_path: Path, loaded: LoadedModel, redis: RedisServer, way: str, patience_s: float
) -> None:
    settings = replace(SETTINGS, lookup_timeout_s=0.5, lookup_pause_s=1.0)
    with ArtifactStore.open(str(tmp_path / "store"), redis.url, patience_s=patience_s) as store:
        manifest = publish(store, loaded, DOCUMENT)
        prompt = [*store.load(manifest.id, ("tokens",))[1]["tokens"].tolist(), 70]
        found = (PrefixMatch(manifest.id, manifest.tokens), None)
        patient = PrefixFinder(store, loaded.identity, SETTINGS)
        finder = PrefixFinder(store, loaded.identity, settings)

        async def scenario() -> None:
            assert await patient.find(prompt, "default") == found
            redis.kill() if way == "killed" else redis.freeze()
            times = []
            for _ in range(20):
                started = time.perf_counter()
                match, miss = await finder.find(prompt, "default")
                times.append(time.perf_counter() - started)
                assert match is None and miss is not None and miss.reason == "unavailable"
            assert times[0] < 8  # Redis is waited for for 30 s, and a socket for 10 s
            assert sum(times[1:]) < 8  # less than 0.5 s each: nearly all of them asked nobody
            if way == "killed":
                redis.start()
                store.rebuild()
            else:
                redis.thaw()
            end = time.monotonic() + 120
            while await finder.find(prompt, "default") != found:
                assert time.monotonic() < end
                await asyncio.sleep(0.2)

        asyncio.run(scenario())


def test_one_call_tries_again_after_each_pause() -> None:
    now = 0.0
    breaker = Breaker(5.0, lambda: now)
    assert breaker.allows() and breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    now = 5.0
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    now = 10.0
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.allows() and breaker.allows()


def test_one_call_tries_at_once_after_a_late_answer() -> None:
    breaker = Breaker(5.0, lambda: 0.0)
    breaker.answered_late()  # nobody had given it up
    assert breaker.allows() and breaker.allows()
    breaker.failed()
    breaker.answered_late()
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.succeeded()
    assert breaker.allows() and breaker.allows()


def test_a_redis_that_stalls_is_asked_again_once_it_has_answered(
    tmp_path: Path, loaded: LoadedModel, redis: RedisServer
) -> None:
    settings = replace(SETTINGS, lookup_timeout_s=0.5, lookup_pause_s=3600.0)
    with ArtifactStore.open(str(tmp_path / "store"), redis.url, patience_s=0.0) as store:
        manifest = publish(store, loaded, DOCUMENT)
        prompt = [*store.load(manifest.id, ("tokens",))[1]["tokens"].tolist(), 70]
        finder = PrefixFinder(store, loaded.identity, settings)

        async def scenario() -> None:
            redis.freeze()
            assert (await finder.find(prompt, "default"))[0] is None
            redis.thaw()
            end = time.monotonic() + 120
            while (await finder.find(prompt, "default"))[0] is None:
                assert time.monotonic() < end
                await asyncio.sleep(0.1)

        asyncio.run(scenario())
