"""`ProxyGuard`: what Ray Serve's HTTP proxy may see of a request's headers, and what it leaves unsaid.

The proxy reads some headers for purposes of its own, before the app sees the request: it sends an
`x-request-id` back and logs it, whatever stands in it, and answers 500 where it cannot decode one. Of a
request whose process died it says nothing, which HTTP makes a 500 in plain text, or a broken connection. Ray
runs the guard in proxies whose environment names `CALLBACK` in `VARIABLE`, which is read when they start.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xkv_service.api.errors import EVENTS, RETRY_S, APIError
from xkv_service.api.request_ids import request_id

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "xkv_workers.serving.proxy_guard:middlewares"

_BROKE_OFF = APIError(
    503, "the answer broke off: its process died, or failed", code="overloaded", retry_after_s=RETRY_S
)
_ID = b"x-request-id"
_UNUSED = frozenset(
    {
        *(b"x-session-id", b"serve-multiplexed-model-id"),
        *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled"),
    }
)
"""Would have a client choose among replicas of the HTTP side, or say how long Serve waits and what it does
when the client goes away; dashes and underscores are one to the proxy."""


class ProxyGuard:
    """ASGI middleware: a sane `x-request-id`, one at most, no header that steers Serve, and an error in
    OpenAI's form where an answer never comes (503), or a stream does not come to its end (an event).

    Args:
        app: Serve's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if "headers" in scope:
            scope = {**scope, "headers": _guarded(scope["headers"])}
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if not answer.begun:
            response = _BROKE_OFF.response()
            response.headers["x-request-id"] = Headers(scope=scope).get("x-request-id") or request_id("")
            await response(scope, receive, send)
        elif answer.streams and not answer.ended:
            # Whoever's stream it was, it may have ended in the middle of an event.
            await send({"type": "http.response.body", "body": b"\n\n" + _BROKE_OFF.event()})


class _Answer:
    """How far an answer has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.streams = self.ended = False

    async def send(self, message: Message) -> None:
        """Send it on."""
        if message["type"] == "http.response.start":
            self.begun = True
            headers = Headers(raw=message["headers"])
            events = headers.get("content-type", "").startswith(EVENTS)
            self.streams = events and "content-encoding" not in headers
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)


def middlewares() -> list[Middleware]:
    """What Ray asks for."""
    return [Middleware(ProxyGuard)]


def _guarded(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    kept, ids = [], []
    for name, value in headers:
        if name == _ID:
            ids.append(value.decode("latin-1"))
        elif name.replace(b"_", b"-") not in _UNUSED:
            kept.append((name, value))
    return [*kept, (_ID, request_id(ids[0]).encode("ascii"))] if ids else kept
