"""`Drain`: how an app ends. It takes no new requests, and those under way have a bounded time to finish."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from xkv_service.api.errors import RETRY_S, APIError

_WATCHED = frozenset({"/healthz", "/metrics"})
"""What a server that ends still answers: it runs, and says how it goes."""
_TELL_S = 5.0
"""For the answers that are broken off to tell it; a client that reads nothing is not waited for."""


class Drain:
    """Counts an app's requests, and ends them. For one event loop."""

    def __init__(self) -> None:
        self.begun = False
        self._running = 0
        self._idle, self._over = asyncio.Event(), asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request under way."""
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def until_over(self) -> None:
        """Wait until answers are to be broken off."""
        await self._over.wait()

    async def end(self, grace_s: float) -> None:
        """Take no more requests; return when none is under way. May be called again, with less time.

        Args:
            grace_s: seconds after which those under way are broken off.
        """
        self.begun = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        self._over.set()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _TELL_S)


class DrainGate:
    """ASGI middleware that refuses requests (503) once the drain has begun.

    Args:
        app: what it guards. drain: counts the requests that it lets in.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _WATCHED:
            await self._app(scope, receive, send)
        elif self._drain.begun:
            stops = APIError(503, "the server stops", code="stopping", retry_after_s=RETRY_S)
            await stops.response()(scope, receive, send)
        else:
            with self._drain.request():
                await self._app(scope, receive, send)
