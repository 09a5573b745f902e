"""Bodies that take their time: how many of a key, and how many bytes of all, before a byte of one is read."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from engines import PacedBackend, wait_until
from rivers import SETTINGS, key
from serving import Served, serve

from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing, Limits
from xkv_service.api.model import ServedModel
from xkv_service.api.settings import APISettings
from xkv_service.errors import InvalidSpec

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
BODY = json.dumps(CHAT).encode()
KEYS = KeyRing((key("alpha"), key("beta"), key("one", limits=Limits(requests=1)), key("boss", operator=True)))


@pytest.fixture
def guarded(served_model: ServedModel, backend: PacedBackend) -> Iterator[Served]:
    """Holds bodies of 10,000 bytes in all, of which one may have 8,000: more than a key's share."""
    settings = APISettings(max_body_bytes=8_000, max_held_bytes=10_000)
    with serve(create_app(served_model, backend, keys=KEYS, settings=settings)) as served:
        yield served


class Slow:
    """A client that has sent the head of a request, and none of its body yet."""

    def __init__(self, served: Served, name: str, *headers: str, path: str = "/v1/chat/completions") -> None:
        self._socket = served.connect()
        lines = ["Host: localhost", f"Authorization: Bearer sk-{name}", "Content-Type: application/json"]
        head = "\r\n".join((f"POST {path} HTTP/1.1", *lines, *headers))
        self.send(f"{head}\r\n\r\n".encode())

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, some: bytes) -> None:
        self._socket.sendall(some)

    def answer(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Status, headers and JSON, however little was sent of the body."""
        with self._socket.makefile("rb") as lines:
            status = int(next(lines).split()[1])
            headers = dict(
                line.decode().lower().strip().split(": ") for line in iter(lines.readline, b"\r\n")
            )
            return status, headers, json.loads(lines.read(int(headers["content-length"])))

    @property
    def has_answer(self) -> bool:
        self._socket.settimeout(0.1)
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except socket.timeout:  # noqa: UP041 - its own class before Python 3.10's alias
            return False
        finally:
            self._socket.settimeout(60)


def length(nbytes: int) -> str:
    return f"Content-Length: {nbytes}"


def wait_for_places(served: Served, places: int) -> None:
    with served.http("sk-boss") as http:
        wait_until(lambda: http.get("/status").json()["traffic"]["in_flight"] == places)


def ask(served: Served, name: str) -> int:
    with served.http(f"sk-{name}") as http:
        return http.post("/v1/chat/completions", json=CHAT).status_code


def test_a_key_sends_as_many_bodies_at_once_as_it_may_have_requests(guarded: Served) -> None:
    """Of 30 bytes each, since 64 are to fit in its share of 2,500."""
    with ExitStack() as clients:
        for _ in range(64):
            slow = clients.enter_context(Slow(guarded, "alpha", length(30)))
            slow.send(BODY[:15])
        wait_for_places(guarded, 64)
        last = clients.enter_context(Slow(guarded, "alpha", length(30)))
        status, headers, answer = last.answer()
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["code"] == "rate_limit_exceeded"
        assert answer["error"]["message"] == "64 requests of this key are under way, as many as it may have"
        assert ask(guarded, "beta") == 200
        with guarded.http("sk-alpha") as http:
            assert http.get("/v1/models").status_code == http.get("/status").status_code == 200
    wait_for_places(guarded, 0)
    assert ask(guarded, "alpha") == 200


def test_who_is_refused_may_send_its_body_and_ask_again(guarded: Served) -> None:
    """The connection is kept: closed under a body that is on its way, it would take the answer along."""
    with Slow(guarded, "one", length(len(BODY))) as first, Slow(guarded, "one", length(len(BODY))) as second:
        wait_until(lambda: first.has_answer or second.has_answer)
        refused, other = (first, second) if first.has_answer else (second, first)
        assert refused.answer()[0] == 429
        other.send(BODY)
        assert other.answer()[0] == 200
        wait_for_places(guarded, 0)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk-one\r\n{length(2)}"
        )
        refused.send(BODY + head.encode() + b"\r\n\r\n{}")
        assert refused.answer()[0] == 400


def test_who_may_have_one_request_has_the_next_when_it_has_its_answer(guarded: Served) -> None:
    with guarded.http("sk-one") as http:
        for number in range(50):
            body = {**CHAT, "stream": number % 2 == 0, "n": 2 if number % 5 == 0 else 1}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == (400 if body["n"] == 2 else 200), answer.text


@pytest.mark.parametrize("announced", ["Content-Length: 8000", "Transfer-Encoding: chunked"])
def test_bodies_hold_so_many_bytes_in_all(guarded: Served, announced: str) -> None:
    """One that does not tell its length may have as many as any."""
    with Slow(guarded, "alpha", announced):
        wait_for_places(guarded, 1)
        with Slow(guarded, "beta", length(8_000)) as other:
            status, headers, answer = other.answer()
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["error"]["code"] == "overloaded"
        assert answer["error"]["message"] == (
            "bodies of requests under way have 8,000 of the 10,000 bytes that this server holds at once"
        )
        assert ask(guarded, "beta") == 200
    wait_for_places(guarded, 0)
    with Slow(guarded, "beta", length(8_000)) as other:
        wait_for_places(guarded, 1)
        assert not other.has_answer


def test_no_key_has_all_the_bytes(served_model: ServedModel, backend: PacedBackend) -> None:
    settings = APISettings(max_body_bytes=1_000, max_held_bytes=10_000)
    app = create_app(served_model, backend, keys=KEYS, settings=settings)
    with serve(app) as served, ExitStack() as clients:
        for _ in range(2):
            clients.enter_context(Slow(served, "alpha", length(1_000)))
        wait_for_places(served, 2)
        status, headers, answer = clients.enter_context(Slow(served, "alpha", length(501))).answer()
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["message"] == (
            "bodies of this key's requests have 2,000 of the 2,500 bytes that it may have at once"
        )
        assert ask(served, "alpha") == ask(served, "beta") == 200
        clients.enter_context(Slow(served, "alpha", length(500)))
        wait_for_places(served, 3)


def test_without_keys_nobody_is_another(served_model: ServedModel, backend: PacedBackend) -> None:
    settings = APISettings(max_body_bytes=1_000, max_held_bytes=3_000)
    app = create_app(served_model, backend, settings=settings)
    with serve(app) as served, ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(Slow(served, "any", length(1_000)))
        with served.http() as http:
            wait_until(lambda: http.get("/status").json()["traffic"]["in_flight"] == 3)
        status, _, answer = clients.enter_context(Slow(served, "any", length(500))).answer()
        assert (status, answer["error"]["code"]) == (503, "overloaded")


def test_what_is_refused_at_the_door_counts_with_its_route(guarded: Served) -> None:
    with Slow(guarded, "one", length(10)) as first:
        wait_for_places(guarded, 1)
        assert not first.has_answer
        assert ask(guarded, "one") == 429
        with guarded.http("sk-nobody") as http:
            assert http.patch("/v1/prefixes/some", json={}).status_code == 401
            assert http.post("/nothing", json={}).status_code == 401
    with guarded.http("sk-boss") as http:
        counted = http.get("/metrics").text.splitlines()
    for route, status in (("/v1/chat/completions", 429), ("/v1/prefixes/{prefix_id}", 401), ("other", 401)):
        assert f'xkv_requests_total{{route="{route}",status="{status}"}} 1.0' in counted


def test_a_body_that_was_read_counts_as_long_as_it_is(guarded: Served, backend: PacedBackend) -> None:
    asked = backend.asked
    with backend.held(), Slow(guarded, "alpha", "Transfer-Encoding: chunked") as chunked:
        chunked.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
        wait_until(lambda: backend.asked == asked + 1)
        with Slow(guarded, "beta", length(8_000)) as other:
            wait_for_places(guarded, 2)
            assert not other.has_answer
    wait_for_places(guarded, 0)


def test_sending_a_body_is_no_time_to_the_first_token(
    guarded: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "xkv_service.api")

    def logged() -> list[dict[str, Any]]:
        found = [vars(record).get("request", {}) for record in list(caplog.records)]
        return [one for one in found if one.get("key") == "alpha"]

    with Slow(guarded, "alpha", length(len(BODY))) as client:
        wait_for_places(guarded, 1)
        time.sleep(0.5)
        client.send(BODY)
        assert client.answer()[0] == 200
    wait_until(lambda: len(logged()) == 1)
    [told] = logged()
    assert 0 < told["first_token_s"] <= told["seconds"] - 0.5


@pytest.mark.parametrize("path", ["/healthz", "/", "/nothing"])
def test_a_body_of_nobody_is_not_read(guarded: Served, path: str) -> None:
    with Slow(guarded, "nobody", length(1_000), path=path) as client:
        status, _, answer = client.answer()
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_bytes_in_all_are_enough_for_one_body() -> None:
    with pytest.raises(InvalidSpec, match="max_held_bytes=9 is out of range"):
        APISettings(max_body_bytes=10, max_held_bytes=9)
    assert SETTINGS.max_held_bytes >= SETTINGS.max_body_bytes
