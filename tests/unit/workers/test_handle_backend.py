"""A replica that dies is replaced only as long as nothing was told, and what waits for one is counted: the
moments are chosen here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from xkv_service.engine.messages import (
    Delta,
    EngineState,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Started,
)
from xkv_service.sessions.settings import GenerationSettings
from xkv_workers.serving import handle_backend
from xkv_workers.serving.handle_backend import HandleBackend

INGRESS = "its name"
HERE: Any = SimpleNamespace(caller=INGRESS, tell_again=lambda: None)
STATE = EngineState(1, 0, 0, 0, 0, ())
WHOLE: list[Event] = [Started(2, 0), Delta("a", 1), Finished("stop", 1, (5,))]


class Dying:
    """Stands in for a Serve handle whose first replica dies behind `events` events."""

    def __init__(self, events: int) -> None:
        self.events, self.calls, self.generate = events, 0, self

    def options(self, **_: Any) -> Dying:
        return self

    def remote(self, _: GenerationRequest, caller: str) -> Dying:
        assert caller == INGRESS
        self.calls += 1
        return self

    def cancel(self) -> None:
        """The first call's."""

    async def __aiter__(self) -> AsyncIterator[Event | None]:
        first = self.calls == 1
        yield None
        for event in WHOLE[: self.events] if first else WHOLE:
            yield event
        if first:
            raise RayActorError


class Full(Dying):
    """Stands in for a Serve handle whose replicas have room for a request after a while."""

    def __init__(self) -> None:
        super().__init__(3)
        self.room = asyncio.Event()
        self.cancelled = 0

    def cancel(self) -> None:
        """One that is not answered to its end."""
        self.cancelled += 1

    async def __aiter__(self) -> AsyncIterator[Event | None]:
        await self.room.wait()
        yield None
        for event in WHOLE:
            yield event


async def told(handle: Dying, *, streamed: bool) -> list[Event]:
    request = GenerationRequest("one", (1, 2), GenerationSettings(), streamed=streamed)
    events = [event async for event in HandleBackend(handle, None, HERE).generate(request)]
    return [replace(one, queued_seconds=0.0) if isinstance(one, Started) else one for one in events]


@pytest.mark.parametrize("events", [0, 1, 2])
def test_a_stream_begins_again_only_where_nothing_was_told(events: int) -> None:
    handle = Dying(events)
    found = asyncio.run(told(handle, streamed=True))
    if events == 0:
        assert (found, handle.calls) == (WHOLE, 2)
        return
    assert handle.calls == 1 and found[:-1] == WHOLE[:events]
    assert isinstance(found[-1], Failed) and found[-1].kind == "overloaded"


@pytest.mark.parametrize("events", [0, 1, 2])
def test_an_answer_that_is_not_streamed_begins_anew(events: int) -> None:
    handle = Dying(events)
    assert asyncio.run(told(handle, streamed=False)) == WHOLE[:events] + WHOLE
    assert handle.calls == 2


def test_an_answer_that_has_ended_is_not_asked_again() -> None:
    handle = Dying(3)
    found = asyncio.run(told(handle, streamed=False))
    assert handle.calls == 1 and found[:3] == WHOLE


def test_what_waits_for_a_replica_is_counted_and_timed() -> None:
    async def asked() -> Event:
        handle = Full()
        backend = HandleBackend(handle, None, HERE)
        events = backend.generate(GenerationRequest("one", (1, 2), GenerationSettings()))
        gone = backend.generate(GenerationRequest("two", (1, 2), GenerationSettings()))
        first = asyncio.ensure_future(anext(events))
        leaves = asyncio.ensure_future(anext(gone))
        await asyncio.sleep(0.05)
        assert backend.waiting == 2
        leaves.cancel()
        await asyncio.sleep(0.01)
        assert backend.waiting == 1
        handle.room.set()
        started = await first
        assert backend.waiting == 0
        await events.aclose()
        return started

    started = asyncio.run(asked())
    assert isinstance(started, Started) and 0.05 <= started.queued_seconds < 10


@pytest.mark.parametrize("streamed", [True, False])
def test_a_replica_is_waited_for_as_long_as_a_place_in_it(streamed: bool) -> None:
    async def asked(limit_s: float, room: bool) -> tuple[list[Event], int]:
        handle = Full()
        backend = HandleBackend(handle, None, HERE)
        request = GenerationRequest(
            "one", (1, 2), GenerationSettings(), streamed=streamed, queue_timeout_s=limit_s
        )
        if room:
            asyncio.get_running_loop().call_later(0.1, handle.room.set)
        events = [event async for event in backend.generate(request)]
        assert backend.waiting == 0 and handle.calls == 1
        return events, handle.cancelled

    (end,), cancelled = asyncio.run(asked(0.05, room=False))
    assert isinstance(end, Failed) and end.kind == "queue_timeout" and cancelled == 1
    for limit_s in (60.0, 0.0):
        events, cancelled = asyncio.run(asked(limit_s, room=True))
        assert events[1:] == WHOLE[1:] and cancelled == 0


class Board:
    """Stands in for a `StateBoard` that answers at once, or late."""

    def __init__(self) -> None:
        self.late_s = 0.0
        self.all = self

    async def remote(self) -> list[EngineState]:
        await asyncio.sleep(self.late_s)
        return [STATE]


def test_a_board_that_is_slow_for_a_moment_takes_no_engine_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_backend, "_BOARD_S", 0.05)

    async def asked() -> None:
        board = Board()
        backend = HandleBackend(None, board, HERE)
        board.late_s = 60.0
        with pytest.raises(asyncio.TimeoutError):
            await backend.states()
        board.late_s = 0.0
        monkeypatch.setattr(handle_backend, "_BOARD_S", 60.0)
        assert await backend.states() == [STATE]
        board.late_s = 3600.0
        monkeypatch.setattr(handle_backend, "_BOARD_S", 0.05)
        assert await backend.states() == [STATE]
        monkeypatch.setattr(handle_backend, "_STALE_S", 0.0)
        with pytest.raises(asyncio.TimeoutError):
            await backend.states()

    asyncio.run(asked())
