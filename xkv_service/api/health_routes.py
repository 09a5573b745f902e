"""/healthz, /readyz and /metrics."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from xkv_service.api.errors import RETRY_S, APIError
from xkv_service.api.server import ERRORS, Server, key_of
from xkv_service.engine.messages import EngineState

_STATES_S = 2.0
_log = logging.getLogger(__name__)


class Health(BaseModel):
    """That the server runs, or is ready."""

    status: str


async def states_of(server: Server) -> list[EngineState]:
    """What the engines say; empty when they do not answer in time."""
    try:
        return await asyncio.wait_for(server.backend.states(), _STATES_S)
    except Exception as error:  # noqa: BLE001 - a replica may fail in any way; that is what is asked here
        _log.warning("the engines do not answer: %s", str(error) or type(error).__name__)
        return []


def refuse_others(request: Request) -> None:
    """Refuse keys that may not see what all namespaces do.

    Raises:
        APIError: 403.
    """
    if not key_of(request).operator:
        raise APIError(403, "this needs a key with operator set")


def health_routes(server: Server) -> APIRouter:
    """The routes that watch the server."""
    router = APIRouter(tags=["health"], responses=ERRORS)

    @router.get("/healthz")
    async def healthz() -> Health:
        """The server runs."""
        return Health(status="ok")

    @router.get("/readyz")
    async def readyz() -> Health:
        """An engine takes requests."""
        if not await states_of(server):
            raise APIError(503, "no engine is ready", code="not_ready", retry_after_s=RETRY_S)
        return Health(status="ready")

    @router.get("/metrics", response_class=Response, dependencies=server.bearer)
    async def metrics(request: Request) -> Response:
        """Figures of all namespaces together, for Prometheus."""
        refuse_others(request)
        lookups = server.finder.counters if server.finder is not None else {}
        content = server.metrics.exposition(await states_of(server), lookups, server.backend.waiting)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return router
