"""How a server ends: stopped while it answers, where nobody's connection just breaks, or with its Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
from asking import wait_until
from openai import OpenAI
from served import Server, command_of

LONG = {"max_tokens": 4000, "temperature": 2.0, "seed": 1}
"""What a model goes on with for long after a plain text. Of a question it soon ends the answer."""


def check_that_sigterm_breaks_off_answers(server: Server) -> None:
    """After the time to finish, of a server that gives some seconds; all its processes get the signal."""
    _stop(server, [server.terminate_all])


def check_that_ctrl_c_twice_breaks_off_answers(server: Server) -> None:
    """At once, of a server that would give them minutes."""
    _stop(server, [lambda: os.killpg(server.process.pid, signal.SIGINT)] * 2)


def check_that_it_ends_with_its_ray(server: Server, part: str) -> None:
    """When a process of its Ray is killed, by the end of its command: it says so, and does not hang."""
    found = [one for one in server.processes(part) if command_of(one).partition(" ")[0].endswith(part)]
    found[0].kill()  # parents come first, and a child of its has its command until it runs its own
    assert server.process.wait(300) == 1
    error, hint = server.log.read_text().splitlines()[-2:]
    assert error == "error: the server has ended: its Ray is gone"
    assert hint.startswith("hint: its logs are in ") and len(server.log.read_text().splitlines()) == 4


def _stop(server: Server, signals: Sequence[Callable[[], object]]) -> None:
    """Running answers end with an error, and later ones are refused."""
    client = LongAnswers(server)
    wait_until_running(server, 0)  # what a replica said that was killed counts for a while
    with ThreadPoolExecutor() as pool:
        whole, stream = pool.submit(client.whole, 1), pool.submit(client.stream, 2)
        wait_until_running(server, 2)
        signals[0]()
        _check_refused(server)
        for again in signals[1:]:
            again()
        _check_broken_off(whole, stream)
    assert server.process.wait(300) == 0, server.log.read_text()
    assert "cut off" not in server.log.read_text()


class LongAnswers:
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

    def stream(self, number: int, on_chunk: Callable[[], object] = lambda: None) -> openai.APIError | None:
        """The error that ended a stream."""
        try:
            for _ in self.openai.completions.create(**self.body(number), stream=True):
                on_chunk()
        except openai.APIError as error:
            return error
        return None


def wait_until_running(server: Server, count: int, seconds: float = 120) -> None:
    """So many answers, of all engines together."""
    wait_until(lambda: f'xkv_sessions{{state="running"}} {count}.0' in server.metrics(), seconds)


def _check_refused(server: Server) -> None:
    """New requests are, and the server says that it is not ready."""
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 503, seconds=30)
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "x", "prompt": "y"}, timeout=60)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "stopping"


def _check_broken_off(whole: Future[httpx.Response], stream: Future[openai.APIError | None]) -> None:
    answer, error = whole.result(120), stream.result(120)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1", answer.text
    assert answer.json()["error"]["code"] == "cancelled", answer.text
    assert error is not None and error.code == "cancelled", repr(error)
    assert "the server stops" in error.message
