"""How requests end early: clients that leave, time that runs out, engines that fail or are full."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import openai
import pytest
from engines import PacedBackend, wait_until
from serving import LONG_CHAT, Served, serve

from xkv_service.api.app import create_app
from xkv_service.api.model import ServedModel
from xkv_service.api.settings import APISettings
from xkv_service.engine.messages import (
    Delta,
    EngineState,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Started,
)


@pytest.fixture
def room() -> int:
    return 1


@pytest.fixture
def running(served_model: ServedModel, slow: PacedBackend) -> Iterator[Served]:
    settings = APISettings(request_timeout_s=600.0, min_fidelity=0.0)
    with serve(create_app(served_model, slow, settings=settings, most_requests=2)) as served:
        yield served


def post(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + content


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_step(
    running: Served, slow: PacedBackend, stream: bool
) -> None:
    with running.connect() as client:
        client.sendall(post({**LONG_CHAT, "stream": stream}))
        wait_until(lambda: slow.state.running == 1)
        with slow.held():
            client.close()
            wait_until(lambda: slow.closed == 1)
            left_at = slow.steps
    wait_until(lambda: slow.busy == 0)
    assert slow.steps - left_at <= 1


def test_a_client_that_leaves_before_its_turn_is_never_run(running: Served, slow: PacedBackend) -> None:
    with running.connect() as first, running.connect() as second:
        first.sendall(post({**LONG_CHAT, "stream": True}))
        wait_until(lambda: slow.state.running == 1)
        second.sendall(post(LONG_CHAT))
        wait_until(lambda: slow.state.waiting == 1)
        second.close()
        wait_until(lambda: slow.state.waiting == 0)
        state = slow.state
        assert state.running == 1 and state.counters["without_artifact"] == 1
    wait_until(lambda: slow.busy == 0)


def test_the_openai_client_may_stop_reading(running: Served, slow: PacedBackend) -> None:
    stream = running.client().chat.completions.create(**LONG_CHAT, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: slow.busy == 0)


class Scripted:
    """Does what a test says, to reach what a real engine seldom does."""

    def __init__(self, *events: Event | Exception, hang: bool = False) -> None:
        self._events, self._hang = events, hang
        self.closed = self.waiting = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        try:
            for event in self._events:
                if isinstance(event, Exception):
                    raise event
                yield event
            if self._hang:
                await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def states(self) -> list[EngineState]:
        return []


STARTED, DELTA = Started(prompt_tokens=5, cached_tokens=0), Delta("text", 1)


@pytest.mark.parametrize(
    ("event", "kind", "code", "status"),
    [
        (Failed("overloaded", "full", retry_after_s=3), openai.InternalServerError, "overloaded", 503),
        (Failed("queue_timeout", "busy"), openai.InternalServerError, "queue_timeout", 503),
        (Failed("timeout", "late"), openai.InternalServerError, "timeout", 504),
        (Failed("invalid", "no", "do otherwise"), openai.BadRequestError, None, 400),
        (Failed("internal", "broken"), openai.InternalServerError, "internal_error", 500),
        (RuntimeError("secret"), openai.InternalServerError, "internal_error", 500),
        (Finished("cancelled", 0), openai.InternalServerError, "cancelled", 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures(
    served_model: ServedModel, event: Any, kind: Any, code: str | None, status: int, stream: bool
) -> None:
    """Before the first token they are a status, behind it an event of the stream."""
    for before in ((), (STARTED, DELTA)):
        backend = Scripted(*before, event)
        if isinstance(event, Finished) and not before:
            continue
        with serve(create_app(served_model, backend)) as served:
            if stream and before:
                chunks = served.client().chat.completions.create(**LONG_CHAT, stream=True)
                with pytest.raises(openai.APIError) as caught:
                    list(chunks)
                assert not isinstance(caught.value, openai.APIStatusError)
            else:
                with pytest.raises(kind) as caught:
                    served.client().chat.completions.create(**LONG_CHAT, stream=stream)
                assert caught.value.status_code == status
                assert ("retry-after" in caught.value.response.headers) == (status == 503)
            assert caught.value.code == code
            assert "secret" not in str(caught.value)
        assert backend.closed == 1


def test_an_answer_that_begins_anew_is_told_once(served_model: ServedModel) -> None:
    again = [Started(5, 4), Delta("other", 2), Finished("stop", 2)]
    with serve(create_app(served_model, Scripted(STARTED, DELTA, *again))) as served:
        answer = served.client().chat.completions.create(**LONG_CHAT)
    assert answer.choices[0].message.content == "other"
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.completion_tokens == 2 and usage.prompt_tokens_details.cached_tokens == 4


def test_an_engine_that_hangs_does_not_hang_the_client(
    served_model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xkv_service.api.generation._GRACE_S", 1.0)  # a slow machine tells the end in it
    settings = APISettings(request_timeout_s=0.5)
    for before in ((), (STARTED, DELTA)):
        backend = Scripted(*before, hang=True)
        with serve(create_app(served_model, backend, settings=settings)) as served:
            with pytest.raises(openai.InternalServerError) as caught:
                served.client().chat.completions.create(**LONG_CHAT)
            assert caught.value.status_code == 504
            with pytest.raises(openai.APIError) as streamed:
                list(served.client().chat.completions.create(**LONG_CHAT, stream=True))
            assert streamed.value.code == "timeout"
        assert backend.closed == 2


def test_a_full_server_says_when_to_come_back(running: Served, slow: PacedBackend) -> None:
    with running.connect() as first, running.connect() as second, running.http() as http:
        first.sendall(post(LONG_CHAT))
        wait_until(lambda: slow.asked == 1)
        second.sendall(post(LONG_CHAT))
        wait_until(lambda: slow.asked == 2)
        answer = http.post("/v1/chat/completions", json=LONG_CHAT)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "overloaded"
        assert slow.asked == 2
    wait_until(lambda: slow.busy == 0)
    with running.http() as http:
        assert http.post("/v1/chat/completions", json={**LONG_CHAT, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_waits_too_long_is_told_when_to_come_back(
    served_model: ServedModel, slow: PacedBackend, stream: bool
) -> None:
    settings = APISettings(queue_timeout_s=0.3)
    with serve(create_app(served_model, slow, settings=settings)) as served, served.http() as http:
        running = served.client().chat.completions.create(**LONG_CHAT, stream=True)
        chunks = iter(running)
        next(chunks)
        answer = http.post("/v1/chat/completions", json={**LONG_CHAT, "stream": stream})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "queue_timeout")
        assert error["message"] == (
            "the server is busy: the request waited 0.3 s and was not begun (send it again later)"
        )
        next(chunks)
        wait_until(lambda: slow.busy == 1)
        assert http.get("/status").json()["traffic"]["in_flight"] == 1
        counted = http.get("/metrics").text
        assert "\nxkv_queue_timeouts_total 1.0" in counted
        assert "\nxkv_engine_ended_queue_timeout_total 1.0" in counted
        running.close()
    wait_until(lambda: slow.busy == 0)


class SlowToClose(Scripted):
    """Runs until it is closed, which takes a moment."""

    def __init__(self) -> None:
        super().__init__(hang=True)
        self.closing = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        try:
            async for event in super().generate(request):
                yield event
        finally:
            self.closing.set()
            await asyncio.sleep(0.05)


def test_a_request_that_is_cancelled_twice_frees_its_place(served_model: ServedModel) -> None:
    """As Ray Serve does it when a client leaves: the second time comes while the answer is being closed."""

    async def in_flight() -> int:
        backend = SlowToClose()
        app = create_app(served_model, backend)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = asyncio.ensure_future(client.post("/v1/chat/completions", json=LONG_CHAT))
            while (status := (await client.get("/status")).json())["traffic"]["in_flight"] == 0:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            asked.cancel()
            await backend.closing.wait()
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            status = (await client.get("/status")).json()
        return int(status["traffic"]["in_flight"])

    assert asyncio.run(in_flight()) == 0


def test_a_client_that_reads_nothing_is_let_go(
    served_model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream is longer than the buffers between."""
    monkeypatch.setattr("xkv_service.api.generation._GRACE_S", 0.2)
    backend = Scripted(STARTED, *[Delta("text " * 2000, 1)] * 2000)
    settings = APISettings(request_timeout_s=1.0)
    app = create_app(served_model, backend, settings=settings)
    with serve(app) as served, served.connect() as client:
        client.sendall(post({**LONG_CHAT, "stream": True}))
        wait_until(lambda: backend.closed == 1)


def test_not_ready_without_an_engine(served_model: ServedModel, running: Served) -> None:
    with serve(create_app(served_model, Scripted())) as served, served.http() as http:
        assert http.get("/healthz").status_code == 200
        assert http.get("/readyz").status_code == 503
    with running.http() as http:
        assert http.get("/readyz").json() == {"status": "ready"}


def test_an_engine_that_has_ended_is_not_ready(running: Served, slow: PacedBackend) -> None:
    slow.engine.close()
    with running.http() as http:
        assert http.get("/readyz").status_code == 503
        answer = http.post("/v1/chat/completions", json=LONG_CHAT)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
