"""`BodyLimit`: has a request take its place, then reads its body once, no more than is allowed and no longer
than it may take."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xkv_service.api.admission import Admission, Slot
from xkv_service.api.errors import APIError

_METHODS = frozenset({"POST", "PUT", "PATCH"})
"""Their requests have a body, whatever the headers tell: HTTP/2 needs none that do."""
_DIGITS = 20
"""Of a length, as many as are worth reading: more than anybody sends."""


def has_body(scope: Scope) -> bool:
    """Whether a body comes with a request."""
    headers = Headers(scope=scope)
    told = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    return told or scope["method"] in _METHODS


class BodyLimit:
    """ASGI middleware that hands the app whole bodies. A request with a body has its place from before a byte
    of it is read to the end of the answer. In its state are the `Slot` as `slot`, and as `read_at` when the
    body had been read (`time.perf_counter`).

    Args:
        app: what it guards. admission: gives places, or refuses to.
        max_bytes: of a body (413). timeout_s: for it to arrive (408).
    """

    def __init__(self, app: ASGIApp, admission: Admission, max_bytes: int, timeout_s: float) -> None:
        self._app, self._admission = app, admission
        self._max_bytes, self._timeout_s = max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not has_body(scope):
            await self._app(scope, receive, send)
            return
        told = _told_bytes(scope)
        most = self._max_bytes if told is None else min(told, self._max_bytes)
        try:
            slot = self._admission.enter(scope["state"]["key"], most)
        except APIError as error:
            # The connection stays: closed under a body that is on its way, it might take this answer along.
            await error.response()(scope, receive, send)
            return
        scope["state"]["slot"] = slot
        try:
            await self._serve(slot, scope, receive, _releasing(slot, send))
        finally:
            slot.release()

    async def _serve(self, slot: Slot, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._timeout_s)
        except asyncio.TimeoutError:
            late = APIError(408, f"the body did not arrive within {self._timeout_s:g} s", code="timeout")
            await _refuse(late, scope, receive, send)
        except APIError as error:
            await _refuse(error, scope, receive, send)
        else:
            if body is not None:
                slot.note_body(len(body))
                scope["state"]["read_at"] = time.perf_counter()
                await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None when the client left in the middle of it."""
        too_large = APIError(413, f"the body is larger than {self._max_bytes:,} bytes: send a shorter one")
        if (_told_bytes(scope) or 0) > self._max_bytes:
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


def _told_bytes(scope: Scope) -> int | None:
    """The length of the body, if the headers tell: beside a transfer encoding it does not count."""
    headers = Headers(scope=scope)
    told = headers.get("content-length", "")
    if "transfer-encoding" in headers or not told.isdecimal():
        return None
    return int(told.lstrip("0")[:_DIGITS] or "0")


def _releasing(slot: Slot, send: Send) -> Send:
    """A `send` that gives the place back with the end of the answer: whoever has it may ask again at once."""

    async def sent(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            slot.release()

    return sent


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
