"""How an app ends: what comes later is refused, what is under way gets a bounded time, then a clean error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from engines import PacedBackend, wait_until
from fastapi import FastAPI
from serving import LONG_CHAT, Served, serve
from starlette.types import Receive, Scope, Send

from xkv_service.api.app import create_app
from xkv_service.api.model import ServedModel


class Ending:
    """An app that a test can end from another thread.

    Attributes:
        url: set once it is served.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self.served: Served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        await self._app(scope, receive, send)

    def end(self, grace_s: float) -> Future[None]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._app.state.drain.end(grace_s), self._loop)

    def ask(self, **body: Any) -> httpx.Response:
        url = f"{self.served.url}/v1/chat/completions"
        return httpx.post(url, json={**LONG_CHAT, **body}, timeout=60)


@pytest.fixture
def ending(served_model: ServedModel, slow: PacedBackend) -> Iterator[Ending]:
    app = Ending(create_app(served_model, slow))
    with serve(app) as app.served:
        yield app


def test_answers_that_take_too_long_end_with_an_error_and_free_their_places(
    ending: Ending, slow: PacedBackend
) -> None:
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(ending.ask)
        stream = ending.served.client().chat.completions.create(**LONG_CHAT, stream=True)
        next(iter(stream))
        wait_until(lambda: slow.asked == 2)
        began = time.monotonic()
        ended = ending.end(0.5)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "cancelled" and "the server stops" in str(caught.value)
        answer = whole.result(60)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "cancelled"
    ended.result(60)
    assert time.monotonic() - began >= 0.5
    wait_until(lambda: slow.busy == 0)


def test_an_answer_that_is_done_in_time_is_whole(ending: Ending, slow: PacedBackend) -> None:
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(ending.ask, max_tokens=40)
        wait_until(lambda: slow.asked == 1)
        ending.end(60).result(60)
        answer = whole.result(60)
    assert answer.status_code == 200, answer.text
    assert 0 < answer.json()["usage"]["completion_tokens"] <= 40


def test_what_comes_later_is_refused_until_the_end(ending: Ending, slow: PacedBackend) -> None:
    with ThreadPoolExecutor() as pool, ending.served.http() as http:
        whole = pool.submit(ending.ask)
        wait_until(lambda: slow.asked == 1)
        patient = ending.end(60)
        wait_until(lambda: http.get("/readyz").status_code == 503)
        later = ending.ask()
        assert later.status_code == 503 and later.headers["retry-after"] == "1"
        assert json.loads(later.text)["error"]["code"] == "stopping"
        assert http.get("/healthz").status_code == http.get("/metrics").status_code == 200
        ending.end(0).result(60)  # less patience
        patient.result(60)
        assert whole.result(60).json()["error"]["code"] == "cancelled"
