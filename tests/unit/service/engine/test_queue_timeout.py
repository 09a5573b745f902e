"""How long a request may wait until an engine computes something of it, and what is left when it may not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from asking import Asked, generated, paced, prompt_of, until
from talking import SELECTION, Talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import Event, Failed, PrefixMatch, Started
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.sessions.settings import GenerationSettings

SETTINGS = EngineSettings(max_running=2, step_tokens=16, prefill_tokens=32, selection=SELECTION)
LIMIT_S = 0.2
LONG = GenerationSettings(max_new_tokens=24)
SLOW_MODEL = 10.0  # seconds a token: whatever can be loaded is


class HoldsAsked(Asked):
    """A request that looks what prefixes are held when it is told something, before it is put away."""

    def __init__(self, pool: PrefixPool, engine: Engine, ids: list[int], **fields: Any) -> None:
        self.pool, self.holds = pool, dict[str, int]()
        super().__init__(engine, ids, **fields)

    def _hear(self, event: Event) -> None:
        self.holds = dict(self.pool.state().holds)
        super()._hear(event)


@pytest.fixture
def slow(talker: Talker) -> Iterator[Talker]:
    """The talker, whose forwards take a while."""
    with paced(talker.model):
        yield talker


@pytest.fixture
def match(talker: Talker, store: ArtifactStore) -> PrefixMatch:
    source = talker.published(store).source
    assert source is not None and source.artifact_id is not None
    return PrefixMatch(source.artifact_id, talker.factors.tokens)


@pytest.fixture
def pool(talker: Talker, store: ArtifactStore) -> Iterator[PrefixPool]:
    fingerprint, rates = talker.loaded.identity.fingerprint, LoadingRates(SLOW_MODEL)
    made = PrefixPool(talker.model, store, SELECTION, 2**24, fingerprint=fingerprint, rates=rates)
    yield made
    made.close()


def _assert_not_begun(asked: Asked) -> None:
    end = asked.wait().end
    assert isinstance(end, Failed) and end.kind == "queue_timeout" and asked.events == [end]
    assert "0.2 s" in end.message and end.hint


def test_what_waits_for_a_place_ends_and_what_runs_goes_on(slow: Talker) -> None:
    with Engine(slow.loaded, replace(SETTINGS, max_running=1)) as engine:
        prompt = prompt_of(slow, "Where does it rise?", document=False)
        running = Asked(engine, prompt, settings=LONG, queue_timeout_s=LIMIT_S)
        waiting = Asked(engine, prompt, queue_timeout_s=LIMIT_S)
        patient = Asked(engine, prompt)
        _assert_not_begun(waiting)
        assert not running.ended.is_set()
        until(lambda: engine.state().waiting == 1)
        for asked in (running, patient):
            most = asked.request.settings.max_new_tokens
            assert asked.wait().tokens == generated(slow, prompt, most=most)
        counters = engine.state().counters
        assert counters["ended_queue_timeout"] == 1 and counters["without_artifact"] == 2


def test_a_place_in_the_batch_is_not_enough_and_its_prefix_is_let_go(
    slow: Talker, pool: PrefixPool, match: PrefixMatch
) -> None:
    """Of a shorter prompt in front of it every step takes all tokens."""
    with Engine(slow.loaded, SETTINGS, pool) as engine:
        question = prompt_of(slow, "Where?")
        Asked(engine, question, match=match).wait()
        until(lambda: engine.state().running == 0)
        held = pool.state().holds.get(match.artifact_id, 0)  # by what is kept of that turn
        long = prompt_of(slow, "x" * 500, document=False)
        running = Asked(engine, long, queue_timeout_s=LIMIT_S)
        longer = prompt_of(slow, "y" * 800)
        waiting = HoldsAsked(pool, engine, longer, match=match, queue_timeout_s=LIMIT_S)
        _assert_not_begun(waiting)
        assert waiting.holds == {match.artifact_id: held + 1}
        until(lambda: pool.state().holds.get(match.artifact_id, 0) == held and engine.state().running == 1)
        assert not running.events, "no more than a part of its prompt is computed"
        assert running.wait().tokens == generated(slow, long)
        again = Asked(engine, question, match=match, queue_timeout_s=60).wait()
        assert again.started.cached_tokens == len(question) - 1


def test_once_begun_it_has_all_the_time_it_had(slow: Talker) -> None:
    with Engine(slow.loaded, SETTINGS) as engine:
        asked = Asked(
            engine, prompt_of(slow, "x" * 400, document=False), settings=LONG, queue_timeout_s=LIMIT_S
        ).wait()
        assert isinstance(asked.events[0], Started) and asked.tokens
