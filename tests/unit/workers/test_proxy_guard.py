"""What Serve's proxy sees of headers that a client made up."""

from __future__ import annotations

import json

import pytest
from ray.serve._private.http_util import (
    _apply_middlewares,
    call_function_from_import_path,
    validate_http_proxy_callback_return,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from xkv_workers.serving.proxy_guard import CALLBACK

SECONDS, KEPT_ON = "x-request-timeout-seconds", "x-request-disconnect-disabled"
USELESS = (
    SECONDS,
    KEPT_ON,
    "x-session-id",
    "X_Session_Id",
    "serve_multiplexed_model_id",
    "Serve-Multiplexed-Model-Id",
)


class Dies:
    """Goes away as Serve's proxy does when a process died: silently, after the first part of an answer."""

    def __init__(self, name: str) -> None:
        self._kind = b"text/event-stream; charset=utf-8" if name == "stream" else b"application/json"
        self._parts = {"told": [], "whole": [b"all"]}.get(name, [b"data: 1\n\n"])
        self._ends = name == "whole"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._parts:
            headers = [(b"content-type", self._kind)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": not self._ends})


@pytest.fixture
def proxy() -> TestClient:
    """The guard where Ray puts it, over an app that tells what it got."""

    async def tell(request: Request) -> JSONResponse:
        return JSONResponse([[name, value] for name, value in request.headers.items()])

    guards = validate_http_proxy_callback_return(call_function_from_import_path(CALLBACK))
    routes = [
        Route("/", tell),
        *(Route(f"/{name}", Dies(name)) for name in ("told", "stream", "json", "whole")),
    ]
    return TestClient(_apply_middlewares(Starlette(routes=routes), guards))


@pytest.mark.parametrize("given", [b"x y", b'{"a":1}', b"a" * 500, b"", b"\xff\x80", "\u202e".encode()])
def test_an_id_that_is_not_sane_is_replaced_everywhere(proxy: TestClient, given: bytes) -> None:
    answer = proxy.get("/", headers=[(b"x-request-id", given), (b"x-request-id", b"second")])
    (told,) = answer.headers.get_list("x-request-id")
    seen = [value for name, value in answer.json() if name == "x-request-id"]
    assert told.startswith("req-") and seen == [told]


def test_a_sane_id_is_kept_and_the_proxy_makes_one_where_there_is_none(proxy: TestClient) -> None:
    assert proxy.get("/", headers={"x-request-id": "a.b-c_1"}).headers["x-request-id"] == "a.b-c_1"
    assert len(proxy.get("/").headers["x-request-id"]) == 36


def test_a_process_that_died_is_told_of(proxy: TestClient) -> None:
    answer = proxy.get("/told")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "overloaded"
    assert len(answer.headers["x-request-id"]) == 36
    assert proxy.get("/told", headers={"x-request-id": "mine"}).headers.get_list("x-request-id") == ["mine"]
    first, nothing, second, rest = proxy.get("/stream").text.split("\n\n")
    assert (first, nothing, rest) == ("data: 1", "", "")
    assert json.loads(second.removeprefix("data: ")) == answer.json()


def test_what_ends_or_is_no_stream_is_left_alone(proxy: TestClient) -> None:
    assert proxy.get("/whole").text == "all"
    with proxy.stream("GET", "/json") as broken:
        assert b"".join(broken.iter_raw()) == b"data: 1\n\n"


@pytest.mark.parametrize("name", USELESS)
def test_headers_that_steer_serve_are_left_out(proxy: TestClient, name: str) -> None:
    answer = proxy.get("/", headers=[(name.encode(), b"\xff"), (b"accept", b"x/y")])
    assert answer.status_code == 200
    assert name.lower() not in [one for one, _ in answer.json()]
    assert ["accept", "x/y"] in answer.json()
