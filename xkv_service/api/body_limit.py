"""`BodyLimit`: reads a request's body once, no more than is allowed and no longer than it may take."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xkv_service.api.errors import APIError


class BodyLimit:
    """ASGI middleware that hands the app whole bodies.

    Args:
        app: what it guards. max_bytes: of a body (413). timeout_s: for it to arrive (408).
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._timeout_s)
        except asyncio.TimeoutError:
            late = APIError(408, f"the body did not arrive within {self._timeout_s:g} s", code="timeout")
            await _refuse(late, scope, receive, send)
        except APIError as error:
            await _refuse(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None when the client left in the middle of it."""
        too_large = APIError(413, f"the body is larger than {self._max_bytes:,} bytes: send a shorter one")
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told[:20]) > self._max_bytes:
            raise too_large
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            parts.append(part)
            size += len(part)
            if size > self._max_bytes:
                raise too_large
        return b"".join(parts)


async def _refuse(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, and close: what is left of the body is not read."""
    response = error.response()
    response.headers["connection"] = "close"
    await response(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then whatever comes (a disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
