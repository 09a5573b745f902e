"""`ProxyGuard`: what Ray Serve's HTTP proxy may see of a request's headers.

The proxy reads some of them for purposes of its own, before the app sees the request: it sends an
`x-request-id` back and logs it, whatever stands in it, and answers 500 where it cannot decode one. Ray
runs the guard in proxies whose environment names `CALLBACK` in `VARIABLE`, which is read when they start.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from xkv_service.api.request_ids import request_id

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "xkv_workers.serving.proxy_guard:middlewares"

_ID = b"x-request-id"
_UNUSED = frozenset({b"x-session-id", b"serve-multiplexed-model-id"})
"""Would have a client choose among replicas of the HTTP side; dashes and underscores are one to the proxy."""


class ProxyGuard:
    """ASGI middleware: a sane `x-request-id`, one at most, and no header that steers Serve.

    Args:
        app: Serve's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if "headers" in scope:
            scope = {**scope, "headers": _guarded(scope["headers"])}
        await self._app(scope, receive, send)


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
