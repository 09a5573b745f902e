"""What requests hold while they run stays under a budget: others wait, and questions do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from asking import SHORT, Asked, generated, paced, until
from talking import SELECTION, Talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.engine.engine import NO_MEMORY, Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import Event, Failed, Finished, GenerationRequest, PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.running_memory import RunningMemory, _free
from xkv_service.engine.sequence import Sequence
from xkv_service.engine.settings import EngineSettings
from xkv_service.sessions.context import Context
from xkv_service.sessions.settings import GenerationSettings

SETTINGS = EngineSettings(max_running=8, step_tokens=16, prefill_tokens=64, selection=SELECTION)
LONG = GenerationSettings(max_new_tokens=40)


class InTurn(Asked):
    """A request that writes down when it has its end."""

    def __init__(self, ended: list[str], name: str, engine: Engine, ids: list[int], **fields: Any) -> None:
        self._ends, self._name = ended, name
        super().__init__(engine, ids, **fields)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            self._ends.append(self._name)
        super()._hear(event)


def prompts(count: int, tokens: int = 120) -> list[list[int]]:
    """Which share nothing."""
    dice = torch.Generator().manual_seed(0)
    return [[10 + one, *torch.randint(5, 90, (tokens - 1,), generator=dice).tolist()] for one in range(count)]


def budget_of(talker: Talker, tokens: int) -> int:
    """Bytes that so many tokens take."""
    memory = RunningMemory.of(talker.model, SETTINGS, 0)
    assert memory.next([waiting(tokens)], []) is not None
    memory.next([], [waiting(tokens)])
    return memory.nbytes


def waiting(tokens: int, match: int = 0, held: int | None = None, prefix: int = 0) -> Sequence:
    """One with a prompt of so many tokens, of which an artifact has `match`; begun, if it holds some."""
    found = PrefixMatch("0" * 64, match) if match else None
    request = GenerationRequest("one", (5,) * tokens, SHORT, match=found)
    made = Sequence(request, lambda event: None, cast("object", None), most=1, ends=frozenset())  # type: ignore[arg-type]
    if held is not None:
        made.context = cast("Context", type("Held", (), {"prefix_tokens": prefix})())
    return made


def test_who_begins_next() -> None:
    memory = RunningMemory(budget=1000.0, token_bytes=2.0, question=16)
    large, small, question = waiting(400), waiting(100), waiting(16)
    behind = waiting(600, match=590)
    assert memory.next([large, small], []) is large
    assert memory.next([large, small], [small]) is large and memory.nbytes == 200
    assert memory.next([large, small, question], [large]) is question, "in the order they came, but for those"
    assert memory.next([large, small, behind], [large]) is behind
    assert memory.next([small], [large]) is small
    assert memory.next([large, small], [large]) is None
    assert memory.next([], [large, behind]) is None and memory.nbytes == 820
    assert memory.next([waiting(10**6)], []) is not None, "alone, whatever it takes"
    assert memory.next([large], [question, behind]) is large, "questions go on for ever"
    behind.whole = True
    assert memory.next([behind], [small]) is None, "its artifact could not be had"


def test_a_prefix_is_not_counted_where_it_is_one() -> None:
    memory = RunningMemory(budget=1000.0, token_bytes=2.0, question=16)
    memory.next([], [waiting(300, match=200, held=250, prefix=200)])
    assert memory.nbytes == 200
    memory.next([], [waiting(300, match=200, held=250)])
    assert memory.nbytes == 600, "computed without its artifact"


def test_on_a_gpu_it_is_what_is_free_less_what_others_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 bytes a tenth is for steps, and no less for what runs."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert _free(torch.device("cuda"), 200) == 700 + 50 - 200 - 100
    assert _free(torch.device("cuda"), 10**6) == 100
    assert _free(torch.device("cpu"), 200) == float("inf")
    memory = RunningMemory(1000.0, 2.0, 16)
    assert memory.holds(400, [waiting(100)]) and not memory.holds(401, [waiting(100)])


def test_prompts_wait_for_memory_and_all_are_answered(talker: Talker) -> None:
    asked_for, most = prompts(6), 0
    settings = replace(SETTINGS, running_bytes=budget_of(talker, 300))
    with paced(talker.model), Engine(talker.loaded, settings) as engine:
        asked = [Asked(engine, ids) for ids in asked_for]
        while not all(one.ended.is_set() for one in asked):
            state = engine.state()
            most = max(most, state.running)
            assert state.running_bytes <= settings.running_bytes
    assert most == 2
    assert [one.tokens for one in asked] == [generated(talker, ids) for ids in asked_for]


def test_a_question_passes_prompts_that_wait(talker: Talker) -> None:
    settings = replace(SETTINGS, running_bytes=budget_of(talker, 130))
    first, second = prompts(2)
    with paced(talker.model), Engine(talker.loaded, settings) as engine:
        long = Asked(engine, first, settings=LONG)
        until(lambda: engine.state().running == 1)
        later, question = Asked(engine, second), Asked(engine, second[:10])
        question.wait()
        assert engine.state().waiting == 1 and not long.ended.is_set()
        assert later.wait().tokens == generated(talker, second)


def test_one_that_needs_more_than_all_runs_alone(talker: Talker) -> None:
    settings = replace(SETTINGS, running_bytes=1)
    with paced(talker.model), Engine(talker.loaded, settings) as engine:
        asked = [Asked(engine, ids) for ids in prompts(3)]
        while not all(one.ended.is_set() for one in asked):
            assert engine.state().running <= 1
    assert [one.tokens for one in asked] == [generated(talker, ids) for ids in prompts(3)]


@pytest.fixture
def without_room(talker: Talker, store: ArtifactStore) -> Iterator[tuple[PrefixPool, PrefixMatch]]:
    """A pool into which no prefix fits, and an artifact."""
    source = talker.published(store).source
    assert source is not None and source.artifact_id is not None
    fingerprint, rates = talker.loaded.identity.fingerprint, LoadingRates(10.0)
    made = PrefixPool(talker.model, store, SELECTION, 1, fingerprint=fingerprint, rates=rates)
    yield made, PrefixMatch(source.artifact_id, talker.factors.tokens)
    made.close()


def test_what_has_to_be_computed_whole_waits_for_that(
    talker: Talker, without_room: tuple[PrefixPool, PrefixMatch]
) -> None:
    """A few tokens behind an artifact pass others; where it cannot be had they are all of the prompt."""
    pool, match = without_room
    settings = replace(SETTINGS, running_bytes=budget_of(talker, 130))
    document, (first, earlier, later) = talker.factors.token_ids.tolist(), prompts(3)
    assert match.tokens > 16
    behind, order = [*document[: match.tokens], 6, 7, 8], list[str]()
    with paced(talker.model), Engine(talker.loaded, settings, pool) as engine:
        InTurn(order, "first", engine, first, settings=LONG)
        until(lambda: engine.state().running == 1)
        before = InTurn(order, "earlier", engine, earlier)
        asked = InTurn(order, "behind", engine, behind, match=match)
        until(lambda: engine.state().counters.get("prefixes_failed_no_room", 0) > 0)
        last = InTurn(order, "later", engine, later)
        assert before.wait().tokens == generated(talker, earlier)
        assert asked.wait().tokens == generated(talker, behind)
        assert last.wait().tokens == generated(talker, later)
        started = asked.started
        assert engine.state().counters["prefixes_failed_no_room"] == 1, "asked for once"
    assert order == ["first", "earlier", "behind", "later"]
    assert started.miss is not None and started.miss.reason == "no_room"
    assert started.queued_seconds > 0.5, "it waited for memory, not for a load"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_request_for_which_there_is_no_memory_may_come_again(
    talker: Talker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who runs beside it goes on."""
    forward, met = talker.model.model.embed_tokens.forward, threading.Event()

    def fail(ids: torch.Tensor) -> torch.Tensor:
        if (ids == 200).any():
            met.set()
            raise error
        return forward(ids)

    monkeypatch.setattr(talker.model.model.embed_tokens, "forward", fail)
    (prompt,) = prompts(1)
    with paced(talker.model), Engine(talker.loaded, SETTINGS) as engine:
        good = Asked(engine, prompt)
        bad = Asked(engine, [7, 200, 7])
        assert bad.wait().end == NO_MEMORY and met.is_set()
        assert isinstance(bad.end, Failed) and bad.end.retry_after_s
        assert good.wait().tokens == generated(talker, prompt)
        until(lambda: engine.state().counters.get("ended_no_memory") == 1)
