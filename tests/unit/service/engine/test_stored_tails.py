"""A tail that had to leave memory comes back from the store, with the very tokens the model alone says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from asking import SHORT, Asked, StillRates, generated, prompt_of, until
from redis_server import RedisServer
from talking import SELECTION, Talker

from xkv_artifacts.blobs import BlobStore
from xkv_artifacts.store import ArtifactStore
from xkv_service.engine import stored_tails
from xkv_service.engine.breaker import Breaker
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.stored_tails import StoredTails
from xkv_service.selection.spec import SelectionSpec

SETTINGS = EngineSettings(max_running=6, step_tokens=16, prefill_tokens=64, selection=SELECTION)
SLOW_MODEL = 10.0  # seconds a token: whatever can be loaded is


class Served:
    """An engine over a store, and what keeps its tails."""

    def __init__(self, talker: Talker, store: ArtifactStore, settings: EngineSettings, rate: float) -> None:
        fingerprint = talker.loaded.identity.fingerprint
        self.talker = talker
        self.pool = PrefixPool(
            talker.model, store, settings.selection, 2**24, fingerprint=fingerprint, rates=StillRates(rate)
        )
        self.stored = StoredTails(talker.loaded, store.tails, self.pool, settings)
        self.engine = Engine(talker.loaded, settings, self.pool, stored=self.stored)

    def close(self) -> None:
        self.engine.close()
        self.stored.close()
        self.pool.close()

    def counter(self, name: str) -> float:
        return self.engine.state().counters.get(f"tails_{name}", 0)

    def evict(self) -> None:
        """Let all tails leave, as a fuller memory would, and wait until they are stored."""
        self.settle()
        tails = self.engine._tails
        before, kept = self._gone(), len(tails)
        tails.clear()
        until(lambda: self._gone() == before + kept)

    def settle(self) -> None:
        """Wait until what was held by requests that ended is put away."""

        def met() -> bool:
            counters = self.engine.state().counters
            begun = sum(counters.get(name, 0) for name in ("from_artifact", "without_artifact"))
            return begun == counters.get("ended_finished", 0)

        until(met)

    def _gone(self) -> float:
        found = self.stored.counters()
        return sum(n for name, n in found.items() if name in ("stored", "not_worth") or name[:5] == "lost_")


@contextmanager
def serving(
    talker: Talker,
    store: ArtifactStore,
    settings: EngineSettings = SETTINGS,
    *,
    rate: float = SLOW_MODEL,
) -> Iterator[Served]:
    made = Served(talker, store, settings, rate)
    try:
        yield made
    finally:
        made.close()


def match_of(talker: Talker, store: ArtifactStore) -> PrefixMatch:
    source = talker.published(store).source
    assert source is not None and source.artifact_id is not None
    return PrefixMatch(source.artifact_id, talker.factors.tokens)


@pytest.fixture(autouse=True)
def patient_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that a busy machine holds up is no Redis that hangs, but where a test says so."""
    monkeypatch.setattr(stored_tails, "_SEARCH_S", 60.0)


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


def first_turn(served: Served, store: ArtifactStore, **fields: Any) -> tuple[list[int], PrefixMatch]:
    """A conversation's first turn behind the document; what the second one's prompt begins with."""
    match = match_of(served.talker, store)
    prompt = prompt_of(served.talker, "Where does it end? " * 5)
    one = Asked(served.engine, prompt, match=match, **fields).wait()
    return [*prompt, *one.tokens], match


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("document", [True, False])
def test_an_evicted_tail_comes_back(
    talkers: Callable[[str], Talker], own_store: ArtifactStore, family: str, document: bool
) -> None:
    talker = talkers(family)
    match = match_of(talker, own_store) if document else None
    with serving(talker, own_store) as served:
        prompt = prompt_of(talker, "Where does it end? " * 5, document=document)
        one = Asked(served.engine, prompt, match=match).wait()
        held = len(prompt) + len(one.tokens) - 1
        served.evict()
        assert served.engine.state().kept_tails == 0 and served.counter("stored") == 1
        assert served.engine.state().stored_tail_bytes == own_store.tails.usage().bytes > 0
        longer = [*prompt, *one.tokens, *prompt_of(talker, "And then?", document=False)]
        two = Asked(served.engine, longer, match=match).wait()
        assert two.started.cached_tokens == held and two.started.load_seconds > 0
        assert two.started.tail_tokens == (held - talker.factors.tokens if document else held)
        assert two.tokens == generated(talker, longer, prefix=document)
        assert served.counter("loaded") == 1
        served.settle()
        if match is not None:
            assert served.pool.state().holds == {match.artifact_id: 1}
    assert served.pool.state().holds == {}


def test_another_engine_finds_it_after_a_restart(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store) as served:
        held, match = first_turn(served, own_store)  # the end of the engine lets it leave
    assert own_store.tails.usage().tails == 1
    longer = [*held, *prompt_of(talker, "And then?", document=False)]
    with serving(talker, own_store) as served:
        two = Asked(served.engine, longer, match=match).wait()
        assert two.started.cached_tokens == len(held) - 1
        assert two.tokens == generated(talker, longer, prefix=True)
    assert own_store.tails.usage().tails == 1  # the longer one replaces what it continues


def test_at_the_end_the_conversations_used_last_are_kept(talker: Talker, own_store: ArtifactStore) -> None:
    """Where the store has no room for all."""
    first, *prompts = [prompt_of(talker, f"{number}" * 180, document=False) for number in range(4)]
    with serving(talker, own_store) as served:
        Asked(served.engine, first).wait()
    size = own_store.tails.usage().bytes + 64 * 1024
    settings = replace(SETTINGS, stored_tail_bytes=2 * size)
    with serving(talker, own_store, settings) as served:
        ones = [Asked(served.engine, prompt).wait() for prompt in prompts]
    assert served.counter("stored") == 2 and served.counter("lost_closing") == 1
    with serving(talker, own_store, settings) as served:
        for prompt, one in list(zip(prompts, ones, strict=True))[1:]:
            longer = [*prompt, *one.tokens, *prompt_of(talker, "And then?", document=False)]
            two = Asked(served.engine, longer).wait()
            assert two.started.cached_tokens == len(prompt) + len(one.tokens) - 1


def test_tails_leave_for_the_store_when_the_budget_is_full(talker: Talker, own_store: ArtifactStore) -> None:
    match = match_of(talker, own_store)
    prompts = [prompt_of(talker, f"{number}" * 90) for number in range(6)]
    with serving(talker, own_store, replace(SETTINGS, tail_bytes=300_000)) as served:
        ones = [Asked(served.engine, prompt, match=match).wait() for prompt in prompts]
        served.settle()
        kept = served.engine.state().kept_tails
        until(lambda: served.counter("stored") == len(prompts) - kept > 0)
        for prompt, one in zip(prompts, ones, strict=True):
            longer = [*prompt, *one.tokens, *prompt_of(talker, "And then?", document=False)]
            two = Asked(served.engine, longer, match=match).wait()
            assert two.started.cached_tokens == len(prompt) + len(one.tokens) - 1
            assert two.tokens == generated(talker, longer, prefix=True)
            assert served.engine.state().tail_bytes <= 300_000
        assert served.counter("loaded") > 0


def test_a_prompt_that_parts_from_the_tail_uses_what_it_shares(
    talker: Talker, own_store: ArtifactStore
) -> None:
    with serving(talker, own_store) as served:
        held, match = first_turn(served, own_store)
        served.evict()
        other = [*held[:-4], 9, 9, 9, *prompt_of(talker, "No.", document=False)]
        two = Asked(served.engine, other, match=match).wait()
        shared = next(place for place, (a, b) in enumerate(zip(held, other, strict=False)) if a != b)
        assert match.tokens < shared - 64 < two.started.cached_tokens <= shared
        assert two.tokens == generated(talker, other, prefix=True)


def test_other_namespaces_compute_it(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store) as served:
        held, match = first_turn(served, own_store, namespace="acme")
        served.evict()
        longer = [*held, *prompt_of(talker, "And then?", document=False)]
        two = Asked(served.engine, longer, match=match, namespace="other").wait()
        assert two.started.cached_tokens == match.tokens and served.counter("loaded") == 0
        three = Asked(served.engine, longer, match=match, namespace="acme").wait()
        assert three.started.cached_tokens == len(held) - 1
        assert three.tokens == two.tokens == generated(talker, longer, prefix=True)


def test_a_damaged_blob_is_computed_again(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store) as served:
        held, match = first_turn(served, own_store)
        served.evict()
        path = next((Path(own_store.blobs.url) / "tails").glob("*/*"))
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)
        longer = [*held, *prompt_of(talker, "And then?", document=False)]
        two = Asked(served.engine, longer, match=match).wait()
        assert two.started.cached_tokens == match.tokens and two.started.miss is None
        assert two.tokens == generated(talker, longer, prefix=True)
        assert served.counter("failed_corrupt") == 1 and own_store.tails.usage().tails == 0
        served.settle()
        assert served.pool.state().holds == {match.artifact_id: 1}


def test_another_selection_or_weights_are_other_tails(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store) as served:
        held, match = first_turn(served, own_store)
    longer = [*held, *prompt_of(talker, "And then?", document=False)]
    settings = replace(SETTINGS, selection=SelectionSpec(budget=30, recent=0))
    with serving(talker, own_store, settings) as served:
        two = Asked(served.engine, longer, match=match).wait()
        assert two.started.cached_tokens == match.tokens
        assert served.counter("failed_foreign") == 1
    identity = talker.loaded.identity.model_copy(update={"fingerprint": "b" * 64})
    other = replace(talker, loaded=replace(talker.loaded, identity=identity))
    with serving(other, own_store) as served:
        assert Asked(served.engine, longer).wait().started.cached_tokens == 0
        assert served.counter("none") == 1


def test_a_prefix_that_is_not_in_memory_leaves_its_tails_in_the_store(
    talker: Talker, own_store: ArtifactStore
) -> None:
    with serving(talker, own_store) as served:
        held, _ = first_turn(served, own_store)
    longer = [*held, *prompt_of(talker, "And then?", document=False)]
    with serving(talker, own_store) as served:
        two = Asked(served.engine, longer).wait()
        assert two.started.cached_tokens == 0 and served.counter("failed_no_prefix") == 1
        assert two.tokens == generated(talker, longer)


def test_of_two_tails_the_one_that_can_be_used_is(talker: Talker, own_store: ArtifactStore) -> None:
    prompt = prompt_of(talker, "Where does it end? " * 5)
    for match in (match_of(talker, own_store), None):
        with serving(talker, own_store) as served:
            Asked(served.engine, prompt, match=match).wait()
    assert own_store.tails.usage().tails == 2
    with serving(talker, own_store) as served:
        two = Asked(served.engine, prompt).wait()
        assert two.started.cached_tokens == len(prompt) - 1 and two.started.artifact_id is None
        assert two.tokens == generated(talker, prompt)


def test_a_fast_model_neither_stores_nor_looks(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store, rate=1e-9) as served:
        held, match = first_turn(served, own_store)
        served.evict()
        assert served.counter("not_worth") == 1 and own_store.tails.usage().tails == 0
        Asked(served.engine, [*held, 7, 8, 9], match=match).wait()
        assert not any(served.counter(name) for name in ("none", "loaded", "failed_slow_load"))


class SlowBlobs:
    """A shelf's blobs that open when they are let."""

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs, self.let, self.reached = blobs, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.blobs, name)

    def open(self, artifact_id: str) -> BinaryIO:
        self.reached.set()
        assert self.let.wait(120)
        return self.blobs.open(artifact_id)


def slow_second_turn(
    talker: Talker, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], PrefixMatch, list[int], SlowBlobs]:
    """What a first turn left, its match, the prompt of a second one, and the shelf that it is to wait for."""
    with serving(talker, store) as served:
        held, match = first_turn(served, store)
    slow = SlowBlobs(store.tails.blobs)
    monkeypatch.setattr(store.tails._checked, "_blobs", slow)
    return held, match, [*held, *prompt_of(talker, "And then?", document=False)], slow


def test_nobody_waits_longer_than_computing_takes(
    talker: Talker, own_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, match, longer, slow = slow_second_turn(talker, own_store, monkeypatch)
    with serving(talker, own_store, rate=0.01) as served:
        two = Asked(served.engine, longer, match=match).wait()
        gained = len(held) - 1 - match.tokens
        assert two.started.cached_tokens == match.tokens
        assert two.started.load_seconds < 2 * gained * 0.01 + 5
        assert two.tokens == generated(talker, longer, prefix=True)
        assert served.counter("failed_slow_load") == 1
        again = [*held, *prompt_of(talker, "What?", document=False)]
        other = Asked(served.engine, again, match=match, namespace="x").wait()  # in vain, so it does not wait
        assert (
            other.started.load_seconds < max(0.5, two.started.load_seconds / 2)
            and served.counter("failed_slow_load") == 2
        )
        slow.let.set()
        until(lambda: not served.stored._late)
        until(lambda: served.counter("loaded") == 1)  # late, but a lesson
        served.settle()
        assert sum(served.pool.state().holds.values()) == served.engine.state().kept_tails


def test_cancelled_while_its_tail_is_loaded(
    talker: Talker, own_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, match, longer, slow = slow_second_turn(talker, own_store, monkeypatch)
    with serving(talker, own_store) as served:
        asked = Asked(served.engine, longer, match=match)
        assert slow.reached.wait(60)
        asked.cancel()
        asked.wait()
        tails = served.engine._tails._kept
        slow.let.set()
        # It is counted before the engine is given it.
        until(lambda: any(len(kept.context.ids) >= len(held) - 1 for kept in list(tails.values())))
        two = Asked(served.engine, longer, match=match).wait()  # it is in memory now
        assert two.started.cached_tokens == len(held) - 1 and served.counter("loaded") == 1
        served.settle()
        assert sum(served.pool.state().holds.values()) == served.engine.state().kept_tails


def test_a_full_queue_loses_tails_and_keeps_nobody_waiting(
    talker: Talker, own_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, put = threading.Event(), own_store.tails.put
    monkeypatch.setattr(own_store.tails, "put", lambda *a, **k: (let.wait(120), put(*a, **k))[1])
    monkeypatch.setattr(stored_tails, "_QUEUE_BYTES", 1000)
    match = match_of(talker, own_store)
    with serving(talker, own_store, replace(SETTINGS, tail_bytes=300_000)) as served:
        for number in range(8):
            Asked(served.engine, prompt_of(talker, f"{number}" * 90), match=match).wait()
        until(lambda: served.counter("lost_queue_full") > 0)
        let.set()
        until(lambda: served.counter("stored") > 0)
        served.settle()
        assert sum(served.pool.state().holds.values()) == served.engine.state().kept_tails


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_without_redis_everything_is_computed(
    talker: Talker, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = RedisServer(tmp_path / "r")
    redis.start()
    try:
        with ArtifactStore.open(str(tmp_path / "s"), redis.url, patience_s=0.2) as store:
            with serving(talker, store, rate=0.01) as served:
                held, match = first_turn(served, store)
                served.evict()
                monkeypatch.setattr(stored_tails, "_SEARCH_S", 1.0)
                getattr(redis, how)()
                longer = [*held, *prompt_of(talker, "And then?", document=False)]
                began = time.monotonic()
                two = Asked(served.engine, longer, match=match).wait()
                assert two.started.cached_tokens == match.tokens
                assert two.tokens == generated(talker, longer, prefix=True)
                assert time.monotonic() - began < 30
                three = Asked(served.engine, prompt_of(talker, "Why? " * 20), match=match).wait()
                assert three.started.load_seconds < 10
                redis.thaw() if how == "freeze" else redis.start()
                failed = served.counter("failed_slow_load") + served.counter("failed_unavailable")
                assert failed >= 1 and served.counter("loaded") == 0
            assert served.counter("lost_unavailable") == 0
    finally:
        redis.kill()


def test_a_redis_that_hangs_costs_one_prompt_a_second(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waited = [0.0], list[bool]()
    monkeypatch.setattr(stored_tails, "Breaker", lambda pause_s: Breaker(pause_s, lambda: now[0]))
    redis = RedisServer(tmp_path / "r")
    redis.start()
    try:
        with (
            ArtifactStore.open(str(tmp_path / "s"), redis.url, patience_s=0.2) as store,
            serving(talker, store) as served,  # computing would take minutes, as far as it knows
        ):
            held, match = first_turn(served, store)
            served.evict()
            request = served.stored.request
            monkeypatch.setattr(served.stored, "request", lambda *a: waited.append(request(*a)) or waited[-1])
            monkeypatch.setattr(stored_tails, "_SEARCH_S", 1.0)
            redis.freeze()
            began = time.monotonic()
            for number in range(3):
                prompt = prompt_of(talker, f"{number} " * 90)
                Asked(served.engine, prompt, namespace=f"other-{number}").wait()
            assert waited == [True, False, False] and time.monotonic() - began >= 1
            redis.thaw()
            until(lambda: not served.stored._late)
            assert served.counter("failed_unavailable") >= 1
            monkeypatch.setattr(stored_tails, "_SEARCH_S", 60.0)
            now[0] = stored_tails._PAUSE_S  # it is asked again
            longer = [*held, *prompt_of(talker, "And then?", document=False)]
            assert Asked(served.engine, longer, match=match).wait().started.cached_tokens == len(held) - 1
    finally:
        redis.kill()


def test_a_load_may_take_longer_than_the_search(
    talker: Talker, own_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, match, longer, slow = slow_second_turn(talker, own_store, monkeypatch)
    monkeypatch.setattr(stored_tails, "_SEARCH_S", 3.0)
    with serving(talker, own_store) as served:
        asked = Asked(served.engine, longer, match=match)
        assert slow.reached.wait(60)
        time.sleep(3.1)
        slow.let.set()
        two = asked.wait()
        assert two.started.cached_tokens == len(held) - 1 and two.started.load_seconds > 3


def test_a_search_that_finds_nothing_is_no_load(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store) as served:
        one = Asked(served.engine, prompt_of(talker, "Where does it end? " * 5)).wait()
        assert served.counter("none") == 1 and one.started.load_seconds == 0


def test_a_tail_larger_than_the_stores_budget_is_lost_alone(talker: Talker, own_store: ArtifactStore) -> None:
    with serving(talker, own_store) as served:
        first_turn(served, own_store)
        served.evict()
    there = own_store.tails.usage()
    with serving(talker, own_store, replace(SETTINGS, stored_tail_bytes=there.bytes)) as served:
        Asked(served.engine, prompt_of(talker, "Where? " * 90)).wait()
        served.evict()
        assert served.counter("lost_too_large") == 1 and own_store.tails.usage() == there


def test_a_tail_that_cannot_be_offered_is_lost_alone(
    talker: Talker, own_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(stored_tails, "leaving", refuse)
    with serving(talker, own_store) as served:
        held, match = first_turn(served, own_store)
        served.evict()
        assert served.counter("lost_failed") == 1 and served.engine.state().kept_tails == 0
        two = Asked(served.engine, [*held, 7, 8, 9], match=match).wait()
        assert two.tokens == generated(talker, [*held, 7, 8, 9], prefix=True)
        served.settle()
        assert sum(served.pool.state().holds.values()) == served.engine.state().kept_tails == 1


def test_eviction_and_return_at_random(talker: Talker, own_store: ArtifactStore) -> None:
    """Many conversations side by side in little memory: each turn as the model alone says it."""
    match = match_of(talker, own_store)
    settings = replace(SETTINGS, tail_bytes=300_000, stored_tail_bytes=1_000_000)
    talks: dict[int, list[int]] = {n: prompt_of(talker, f"{n}: where? " * (2 + n)) for n in range(6)}
    with serving(talker, own_store, settings) as served:
        for turn in range(3):
            asked = {n: Asked(served.engine, ids, match=match, settings=SHORT) for n, ids in talks.items()}
            for n, one in asked.items():
                assert one.wait().tokens == generated(talker, talks[n], prefix=True)
                more = prompt_of(talker, "?" * (turn + n), document=False)
                talks[n] = [*talks[n], *one.tokens, *more]
        assert served.counter("stored") > 0 and served.counter("loaded") > 0
        assert own_store.tails.usage().bytes <= 1_000_000


def test_what_tokens_cost_behind_a_prefix_is_asked_for_tails(
    talker: Talker, own_store: ArtifactStore
) -> None:
    """Where exact tokens cost next to nothing, a tail behind factors is stored and loaded, and no other."""
    with serving(talker, own_store, rate=1e-9) as served:
        match = match_of(talker, own_store)
        served.pool.prefetch(match.artifact_id)
        until(lambda: match.artifact_id in served.pool.state().prefixes)
        slow = 200 * SLOW_MODEL
        LoadingRates.prefilled(served.pool.rates, match.tokens, 200, slow, prefix=match.tokens)
        prompt = prompt_of(talker, "Where does it end? " * 5)
        Asked(served.engine, prompt, match=match, namespace="other").wait()
        served.evict()
        assert (served.counter("stored"), served.counter("not_worth")) == (1, 0)
        Asked(served.engine, prompt).wait()
        served.evict()
        assert (served.counter("stored"), served.counter("not_worth")) == (1, 1)
        again = Asked(served.engine, prompt, match=match, namespace="other").wait()
        assert again.started.cached_tokens > match.tokens and served.counter("loaded") == 1
