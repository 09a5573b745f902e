"""`Doorkeeper`: lets requests with a valid key in, before a byte of their bodies is read."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from xkv_service.api.body_limit import has_body
from xkv_service.api.errors import APIError
from xkv_service.api.keys import KeyRing
from xkv_service.api.settings import LOCAL_HOSTS, APISettings

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
"""What anybody who can connect may see: nothing in them tells of prefixes or traffic."""


class Doorkeeper:
    """ASGI middleware; puts the request's `Key` into its state as `key`.

    Args:
        app: what it guards. keys: who may enter. settings: whether other machines may enter without keys, and
            how this one is told from them.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, settings: APISettings) -> None:
        self._app, self._keys = app, keys
        self._this_machine_alone = keys.is_open and not settings.open_network
        self._published = bool(settings.published)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))) is not None:
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> APIError | None:
        key = self._keys.find(request.headers.get("authorization"))
        request.state.key = key
        if self._this_machine_alone and not _is_local(request, self._published):
            message = "this server has no keys and answers requests to localhost alone"
            return APIError(403, f"{message} (its operator can start it with --keys, or --open-network)")
        if key is None and (request.url.path not in OPEN_PATHS or has_body(request.scope)):
            return APIError(401, "no valid key: send one of this server's as Authorization: Bearer <key>")
        return None


def _is_local(request: Request, published: bool) -> bool:
    """Whether this machine asks, and by a name of this machine: a page elsewhere may have a name resolved to
    127.0.0.1, and would reach the server from a browser here. All that comes by a published port seems to be
    another machine's: there the name alone tells."""
    if request.url.hostname not in LOCAL_HOSTS:
        return False
    try:
        return published or request.client is None or ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
