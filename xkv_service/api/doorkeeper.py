"""`Doorkeeper`: lets requests with a valid key in, before a byte of their bodies is read."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from xkv_service.api.body_limit import has_body
from xkv_service.api.errors import APIError
from xkv_service.api.keys import KeyRing

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
"""What anybody who can connect may see: nothing in them tells of prefixes or traffic."""

_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Doorkeeper:
    """ASGI middleware; puts the request's `Key` into its state as `key`.

    Args:
        app: what it guards. keys: who may enter. open_network: whether other machines may enter without keys.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, open_network: bool) -> None:
        self._app, self._keys, self._open_network = app, keys, open_network

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))) is not None:
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> APIError | None:
        key = self._keys.find(request.headers.get("authorization"))
        request.state.key = key
        if self._keys.is_open and not self._open_network and not _is_local(request):
            message = "this server has no keys and answers requests to localhost alone"
            return APIError(403, f"{message} (its operator can start it with --keys, or --open-network)")
        if key is None and (request.url.path not in OPEN_PATHS or has_body(request.scope)):
            return APIError(401, "no valid key: send one of this server's as Authorization: Bearer <key>")
        return None


def _is_local(request: Request) -> bool:
    """Whether this machine asks, and by a name of this machine: a page elsewhere may have a name resolved to
    127.0.0.1, and would reach the server from a browser here."""
    try:
        client = request.client is None or ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
    return client and (request.url.hostname or "") in _LOCAL_HOSTS
