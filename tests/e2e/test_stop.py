"""`xkv serve` is stopped while it answers: nobody's connection just breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from served import Server

LONG = {"max_tokens": 4000, "temperature": 2.0, "seed": 1}
"""An answer that a model seldom ends by itself."""


class Client:
    """Asks for answers that are longer than the server has time for."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.openai = OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        self.model = self.openai.models.list().data[0].id

    def body(self, number: int, **options: Any) -> dict[str, Any]:
        text = f"{number}: write the names of all rivers, with their lengths. " * 4
        return {"model": self.model, "prompt": text, **LONG, **options}

    def whole(self, number: int, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.server.url}/v1/completions", json=self.body(number, **options), timeout=300)

    def stream(self, number: int) -> openai.APIError | None:
        """The error that ended a stream."""
        try:
            for _ in self.openai.completions.create(**self.body(number), stream=True):
                pass
        except openai.APIError as error:
            return error
        return None


def _running(server: Server, count: int) -> None:
    end = time.monotonic() + 120
    while f'xkv_sessions{{state="running"}} {count}.0' not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.2)


def _refused(server: Server) -> None:
    """New requests are, and the server says that it is not ready."""
    end = time.monotonic() + 30
    while httpx.get(f"{server.url}/readyz").status_code != 503:
        assert time.monotonic() < end
        time.sleep(0.05)
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "x", "prompt": "y"})
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "stopping"


def _broken_off(whole: Future[httpx.Response], stream: Future[openai.APIError | None]) -> None:
    answer, error = whole.result(120), stream.result(120)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1", answer.text
    assert answer.json()["error"]["code"] == "cancelled"
    assert error is not None and error.code == "cancelled", repr(error)
    assert "the server stops" in error.message


def _to_process(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)


def _to_group(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("grace", "signals"),
    [
        ("2s", [_to_process]),
        ("10m", [_to_group, _to_group]),
    ],
    ids=["SIGTERM", "Ctrl-C twice"],
)
def test_running_answers_end_with_an_error_and_later_ones_are_refused(
    grace: str, signals: list[Callable[[Server], None]], tmp_path: Path
) -> None:
    """At the first signal after the time to finish, at a second one at once."""
    server = Server(tmp_path, "--store", tmp_path / "store", "--stop-grace", grace)
    client = Client(server)
    with ThreadPoolExecutor() as pool:
        whole, stream = pool.submit(client.whole, 1), pool.submit(client.stream, 2)
        _running(server, 2)
        signals[0](server)
        _refused(server)
        for again in signals[1:]:
            again(server)
        _broken_off(whole, stream)
    assert server.process.wait(300) == 0, server.log.read_text()
    assert "cut off" not in server.log.read_text()
