"""The first forward behind a prefix that is still being read: what it says, and that it is told to nobody too
early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from asking import SHORT, Asked, generated, paced, until
from compressed import random_ids
from families import tiny_model
from published import prompt_logits, publish
from talking import DOCUMENT, SELECTION, Talker

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.local_blobs import LocalBlobStore
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.artifact_parts import part_names
from xkv_service.decoding.arriving import Arriving, ArrivingCache, NotArriving
from xkv_service.decoding.loading import load_factors, load_parts
from xkv_service.decoding.prefix import Binding, Prefix
from xkv_service.engine.engine import Engine
from xkv_service.engine.head_start import HeadStart, Ran
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import Failed, Finished, PrefixMatch, Started
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.sessions.settings import GenerationSettings

SETTINGS = EngineSettings(max_running=6, step_tokens=16, prefill_tokens=64, selection=SELECTION)
SINGLE = CompressionSpec(group_size=1, rank_k=24, rank_v=32)
LONG = GenerationSettings(max_new_tokens=400)  # of a paced model some 20 s
SLOW_MODEL = 10.0  # seconds a token: whatever can be loaded is


class GatedFile:
    """A file whose later half is read only when the gate is open."""

    def __init__(self, file: BinaryIO, gate: threading.Event, reached: threading.Event) -> None:
        self._file, self._gate, self._reached = file, gate, reached
        self._closed_part = Path(file.name).stat().st_size // 2

    def readinto(self, view: Any) -> int:
        if self._file.tell() > self._closed_part:
            self._reached.set()
            assert self._gate.wait(60)
        return self._file.readinto(view)  # type: ignore[attr-defined, no-any-return]

    def __enter__(self) -> GatedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class GatedBlobs(LocalBlobStore):
    """A folder whose blobs are read to the half, and on when the gate is opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate, self.reached = threading.Event(), threading.Event()

    def open(self, artifact_id: str) -> BinaryIO:
        return GatedFile(super().open(artifact_id), self.gate, self.reached)  # type: ignore[return-value]


@pytest.fixture
def blobs(tmp_path: Path) -> GatedBlobs:
    return GatedBlobs(tmp_path / "store")


@pytest.fixture
def gated(talker: Talker, tmp_path: Path, blobs: GatedBlobs) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        talker.published(store)
        yield ArtifactStore(blobs, store.catalog)
        blobs.gate.set()


@pytest.fixture
def pool(talker: Talker, gated: ArtifactStore) -> Iterator[PrefixPool]:
    made = PrefixPool(
        talker.model,
        gated,
        SELECTION,
        2**24,
        fingerprint=talker.loaded.identity.fingerprint,
        rates=LoadingRates(SLOW_MODEL),
    )
    yield made
    made.close()


@pytest.fixture
def engine(talker: Talker, pool: PrefixPool) -> Iterator[Engine]:
    with Engine(talker.loaded, SETTINGS, pool) as made:
        yield made


@pytest.fixture
def match(talker: Talker, gated: ArtifactStore) -> PrefixMatch:
    (name,) = gated.blobs.ids()
    return PrefixMatch(name, talker.factors.tokens)


def _prompt(talker: Talker, question: str = "Who?") -> list[int]:
    messages = [{"role": "user", "content": f"{DOCUMENT}\n\n{question}"}]
    return talker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _head_starts() -> int:
    return sum(thread.name == "head-start" for thread in threading.enumerate())


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "qwen3_next"])
def test_a_forward_waits_for_its_layers_and_says_what_it_says_later(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    with ArtifactStore.open(str(tmp_path)) as store, torch.no_grad(), enable_xkv(model):
        name = publish(store, compress(model, random_ids(150), SINGLE))
        manifest = store.manifest(name)
        names = [one for part in part_names(manifest) for one in part]
        assert sorted(names) == sorted(manifest.tensors)
        parts = load_parts(store, manifest, None)
        binding = Binding(model, next(parts), manifest.groups)
        arriving = Arriving(binding.prefix)
        cache = ArrivingCache(arriving, SelectionSpec(budget=32), threading.Event())
        said: list[torch.Tensor] = []
        forward = threading.Thread(target=lambda: said.append(prompt_logits(model, cache)), daemon=True)
        forward.start()
        for part in parts:
            forward.join(0.05)
            assert forward.is_alive() and not said
            binding.add(part)
            arriving.came()
        forward.join(20)
        whole = Prefix.of(model, load_factors(store, name))
        expected = XKVCache(whole, SelectionSpec(budget=32))
        assert torch.equal(said[0], prompt_logits(model, expected))
        settled = cache.settled()
        assert torch.equal(prompt_logits(model, settled), prompt_logits(model, expected))


@pytest.mark.parametrize("packed", [False, True])
def test_parts_are_the_tensors_of_the_whole(tmp_path: Path, packed: bool) -> None:
    model = tiny_model("gemma3")
    with ArtifactStore.open(str(tmp_path)) as store:
        name = publish(store, compress(model, random_ids(150), SINGLE))
        if packed:
            pytest.importorskip("zstandard")
            assert store.pack(name)
        head, *parts = load_parts(store, store.manifest(name), None)
        joined, whole = head.joined(parts).to_tensors(), load_factors(store, name).to_tensors()
        assert joined.keys() == whole.keys()
        assert all(torch.equal(joined[one], tensor) for one, tensor in whole.items())


def test_layers_that_will_not_come_end_the_forward(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with ArtifactStore.open(str(tmp_path)) as store, enable_xkv(model):
        manifest = store.manifest(publish(store, compress(model, random_ids(150), SINGLE)))
        for end in ("failed", "stopped"):
            parts = load_parts(store, manifest, None)
            binding = Binding(model, next(parts), manifest.groups)
            binding.add(next(parts))
            parts.close()
            arriving, stopped = Arriving(binding.prefix), threading.Event()
            if end == "failed":
                arriving.end()
            else:
                stopped.set()
            with pytest.raises(NotArriving):
                prompt_logits(model, ArrivingCache(arriving, SelectionSpec(), stopped))


@pytest.mark.parametrize("rest", ["short", "long"])
def test_the_answer_is_that_of_the_prefix_and_comes_after_the_load(
    talker: Talker, engine: Engine, blobs: GatedBlobs, match: PrefixMatch, rest: str
) -> None:
    prompt = _prompt(talker, "Who?" if rest == "short" else "Who? " * 40)
    asked = Asked(engine, prompt, match=match)
    assert blobs.reached.wait(60)
    until(lambda: _head_starts() == 1)
    time.sleep(0.1)
    assert not asked.events  # not every byte has been checked
    blobs.gate.set()
    assert asked.wait().tokens == generated(talker, prompt, prefix=True)
    assert asked.started.artifact_id == match.artifact_id
    assert asked.started.cached_tokens == match.tokens
    counters = engine.state().counters
    assert counters["head_starts"] == 1
    assert counters["head_start_tokens"] == min(64, len(prompt) - match.tokens)
    assert counters["cached_tokens"] == match.tokens
    until(lambda: _head_starts() == 0)
    again = Asked(engine, prompt, match=match).wait()
    assert again.tokens == asked.tokens


def test_nothing_of_a_prefix_is_kept_behind_its_answer(
    talker: Talker, engine: Engine, blobs: GatedBlobs, match: PrefixMatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    begin = HeadStart.begin
    monkeypatch.setattr(HeadStart, "begin", lambda start, one: begun.append(start) or begin(start, one))
    asked = Asked(engine, _prompt(talker), match=match)
    assert blobs.reached.wait(60)
    until(lambda: _head_starts() == 1)
    blobs.gate.set()
    asked.wait()
    assert engine.state().counters["head_starts"] == 1
    (start,) = begun
    assert not [one for one in vars(start).values() if isinstance(one, Prefix | Arriving | Ran)]


def test_while_loads_wait_the_engine_does_not_spin(
    talker: Talker, pool: PrefixPool, blobs: GatedBlobs, match: PrefixMatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    state = pool.state
    with Engine(talker.loaded, replace(SETTINGS, max_running=2), pool) as engine:
        asked = [Asked(engine, _prompt(talker, f"{number}?"), match=match) for number in range(5)]
        assert blobs.reached.wait(60)
        until(lambda: engine.state().waiting == 5)
        monkeypatch.setattr(pool, "state", lambda: states.append(1) or state())
        time.sleep(1.0)
        assert len(states) < 20  # one a turn of the engine's thread
        blobs.gate.set()
        assert all(isinstance(one.wait().end, Finished) for one in asked)


def test_damage_that_is_found_late_is_told_to_nobody_but_as_a_miss(
    talker: Talker, gated: ArtifactStore, engine: Engine, blobs: GatedBlobs, match: PrefixMatch
) -> None:
    blob = blobs.root / blob_name(match.artifact_id)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    prompt = _prompt(talker)
    asked = Asked(engine, prompt, match=match)
    assert blobs.reached.wait(60)
    until(lambda: _head_starts() == 1)
    blobs.gate.set()
    assert asked.wait().tokens == generated(talker, prompt)
    assert asked.started.artifact_id is None
    assert asked.started.miss is not None and asked.started.miss.reason == "corrupt"
    assert not gated.blobs.exists(match.artifact_id)
    assert "head_starts" not in engine.state().counters
    until(lambda: _head_starts() == 0)


def test_a_request_that_is_cancelled_ends_its_head_start(
    talker: Talker, pool: PrefixPool, engine: Engine, blobs: GatedBlobs, match: PrefixMatch
) -> None:
    asked = Asked(engine, _prompt(talker), match=match)
    assert blobs.reached.wait(60)
    until(lambda: _head_starts() == 1)
    asked.cancel()
    assert isinstance(asked.wait().end, Finished)
    until(lambda: _head_starts() == 0)  # while the load goes on
    blobs.gate.set()
    until(lambda: pool.state().prefixes == (match.artifact_id,) and not pool.state().holds)


def test_a_load_that_takes_too_long_ends_it_too(
    talker: Talker, gated: ArtifactStore, blobs: GatedBlobs, match: PrefixMatch
) -> None:
    rates = LoadingRates(0.5 / match.tokens)  # a load may take half a second
    fingerprint = talker.loaded.identity.fingerprint
    pool = PrefixPool(talker.model, gated, SELECTION, 2**24, fingerprint=fingerprint, rates=rates)
    with Engine(talker.loaded, SETTINGS, pool) as engine:
        prompt = _prompt(talker)
        asked = Asked(engine, prompt, match=match).wait()
        assert asked.tokens == generated(talker, prompt)
        assert asked.started.miss is not None and asked.started.miss.reason == "slow_load"
        until(lambda: _head_starts() == 0)
        blobs.gate.set()
    pool.close()


def test_a_request_waits_in_no_queue_once_its_head_start_runs(
    talker: Talker, engine: Engine, blobs: GatedBlobs, match: PrefixMatch
) -> None:
    asked = Asked(engine, _prompt(talker), match=match, queue_timeout_s=60.0)
    until(lambda: _head_starts() == 1)
    (sequence,) = engine._loading.values()
    sequence.arrived -= 120.0
    time.sleep(1.2)  # the engine looks twice a second
    assert not asked.events
    blobs.gate.set()
    assert asked.wait().tokens == generated(talker, _prompt(talker), prefix=True)


def test_a_load_beside_a_stream_is_waited_for_as_any_place_is(
    talker: Talker,
    pool: PrefixPool,
    engine: Engine,
    blobs: GatedBlobs,
    match: PrefixMatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool.rates, "prefilled", lambda *_: None)  # else loading would be found too slow
    with paced(talker.model):
        stream = Asked(engine, _prompt(talker, "And?"), settings=LONG)
        until(lambda: any(isinstance(event, Started) for event in stream.events))
        end = Asked(engine, _prompt(talker), match=match, queue_timeout_s=0.1).wait().end
        assert isinstance(end, Failed) and end.kind == "queue_timeout"
        until(lambda: engine.state().waiting == 0)
        assert not stream.ended.is_set(), "it was beside nothing"
    blobs.gate.set()
    until(lambda: pool.state().prefixes == (match.artifact_id,) and not pool.state().holds)
    assert isinstance(stream.wait().end, Finished)


def test_a_forward_that_fails_is_run_again(
    talker: Talker, engine: Engine, blobs: GatedBlobs, match: PrefixMatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Arriving, "wait_for", failing)
    prompt = _prompt(talker)
    asked = Asked(engine, prompt, match=match)
    blobs.gate.set()
    assert asked.wait().tokens == generated(talker, prompt, prefix=True)
    assert "head_starts" not in engine.state().counters


def test_beside_a_stream_nothing_is_begun_early(
    talker: Talker,
    pool: PrefixPool,
    engine: Engine,
    blobs: GatedBlobs,
    match: PrefixMatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool.rates, "prefilled", lambda *_: None)  # else loading would be found too slow
    with paced(talker.model):
        stream = Asked(engine, _prompt(talker, "And?"), settings=LONG)
        until(lambda: any(isinstance(event, Started) for event in stream.events))
        asked = Asked(engine, _prompt(talker), match=match)
        assert blobs.reached.wait(60)
        told = len(stream.events)
        until(lambda: len(stream.events) > told)
        assert not _head_starts() and not asked.events
        assert not stream.ended.is_set(), "it was beside nothing"
    blobs.gate.set()
    assert asked.wait().tokens == generated(talker, _prompt(talker), prefix=True)
    assert "head_starts" not in engine.state().counters


def test_only_one_runs_at_a_time(
    talker: Talker, engine: Engine, blobs: GatedBlobs, match: PrefixMatch
) -> None:
    prompts = [_prompt(talker, question) for question in ("Who?", "Where?", "When?")]
    asked = [Asked(engine, prompt, match=match, settings=SHORT) for prompt in prompts]
    assert blobs.reached.wait(60)
    until(lambda: _head_starts() == 1)
    blobs.gate.set()
    for one, prompt in zip(asked, prompts, strict=True):
        assert one.wait().tokens == generated(talker, prompt, prefix=True)
    assert engine.state().counters["head_starts"] == 1
