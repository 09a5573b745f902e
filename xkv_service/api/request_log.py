"""`RequestLog`: a request id for everybody, one line of log per request, and an answer to every exception."""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xkv_service.api.errors import APIError
from xkv_service.api.metrics import Metrics
from xkv_service.api.request_ids import request_id

_log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The status that log and metrics give a request whose client went away (nginx's number for it)."""


class RequestLog:
    """ASGI middleware, the outermost one. A record of a request has its figures as a text for people, and as
    the mapping `request` for formatters that can tell it; neither holds a word of prompts or answers.

    Args:
        app: what it watches. routes: of its app. metrics: count requests by route and status.
        ids_sent: whether a proxy before it sends the `x-request-id` of each request back: the app sends none.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], metrics: Metrics, ids_sent: bool) -> None:
        self._app, self._routes = app, routes
        self._metrics, self._ids_sent = metrics, ids_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        name = request_id(Headers(scope=scope).get("x-request-id", ""))
        state["request_id"] = name
        status = CLIENT_LEFT
        started = time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self._ids_sent:
                    MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:  # noqa: BLE001 - whatever it was: logged with the request's id, and answered
            _log.exception("the request failed", extra={"request_id": name})
            if status == CLIENT_LEFT:
                await APIError(500, "internal error", code="internal_error").response()(scope, receive, named)
        finally:
            status = state.get("outcome", status)
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = self._route(scope)
        self._metrics.requests.labels(route, str(status)).inc()
        key = scope["state"].get("key")
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "key": None if key is None else key.name,
            **scope["state"].get("answer", {}),
        }
        told = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        _log.info("request %s", told, extra={"request_id": scope["state"]["request_id"], "request": fields})

    def _route(self, scope: Scope) -> str:
        """The pattern of its address, of which there are few; "other" where no route has it."""
        route = scope.get("route")
        if route is None:  # refused before the routes saw it
            route = next((one for one in self._routes if one.matches(scope)[0] is not Match.NONE), None)
        return str(getattr(route, "path", "other"))
