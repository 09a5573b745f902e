"""/ and /status: a page that shows what the server does, and the figures it polls."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from xkv_artifacts.errors import XKVError
from xkv_service.api.errors import of_fault
from xkv_service.api.health_routes import states_of
from xkv_service.api.keys import Key
from xkv_service.api.prefix_objects import PrefixObject
from xkv_service.api.server import ERRORS, Server, key_of
from xkv_service.api.status_page import PAGE, POLICY
from xkv_service.api.traffic import NamespaceTraffic
from xkv_service.engine.messages import EngineState

_MOST_PREFIXES = 50


class EngineStatus(BaseModel):
    """What the engines hold and do now, all namespaces together."""

    engines: int
    running: int
    waiting: int = Field(description="For a replica, for a place in its batch, or for a load.")
    kept_tails: int
    resident_prefixes: int
    prefix_bytes: int
    tail_bytes: int


class TrafficStatus(BaseModel):
    """Requests since the server's start."""

    requests: int
    hits: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    tokens_per_second: float = Field(description="Of answers that ended in the last minute.")
    misses: dict[str, int]
    in_flight: int


class Status(BaseModel):
    """What the asking key may know: of its own namespace, and of engines if it is an operator's."""

    model: str
    context_window: int | None
    namespace: str
    engine: EngineStatus | None
    traffic: TrafficStatus
    prefixes: list[PrefixObject]
    prefixes_error: str | None = Field(
        description="Why they cannot be told, such as `store_unavailable` and what it means; else null."
    )


def status_routes(server: Server) -> APIRouter:
    """The status page and its figures."""
    router = APIRouter(tags=["status"], responses=ERRORS)

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"content-security-policy": POLICY, "cache-control": "no-store"})

    @router.get("/status", dependencies=server.bearer)
    async def status(request: Request) -> Status:
        """Figures of the key's own namespace; for an operator's key of all of them, and of the engines."""
        key = key_of(request)
        engine = _engine(await states_of(server), server.backend.waiting) if key.operator else None
        prefixes, prefixes_error = await _prefixes(server, key)
        return Status(
            model=server.model.name,
            context_window=server.model.window,
            namespace=key.namespace,
            engine=engine,
            traffic=_traffic(server, key),
            prefixes=prefixes,
            prefixes_error=prefixes_error,
        )

    return router


def _engine(states: list[EngineState], waiting: int) -> EngineStatus:
    return EngineStatus(
        engines=len(states),
        running=sum(state.running for state in states),
        waiting=waiting + sum(state.waiting for state in states),
        kept_tails=sum(state.kept_tails for state in states),
        resident_prefixes=len({name for state in states for name in state.prefixes}),
        prefix_bytes=sum(state.prefix_bytes for state in states),
        tail_bytes=sum(state.tail_bytes for state in states),
    )


def _traffic(server: Server, key: Key) -> TrafficStatus:
    known = server.traffic.namespaces
    shown = list(known.values()) if key.operator else [known.get(key.namespace, NamespaceTraffic())]
    misses: dict[str, int] = {}
    for one in shown:
        for reason, count in one.misses.items():
            misses[reason] = misses.get(reason, 0) + count
    names = [k.name for k in server.keys.keys if k.namespace == key.namespace]
    in_flight = server.admission.requests
    return TrafficStatus(
        requests=sum(one.requests for one in shown),
        hits=sum(one.hits for one in shown),
        prompt_tokens=sum(one.prompt_tokens for one in shown),
        cached_tokens=sum(one.cached_tokens for one in shown),
        generated_tokens=sum(one.generated_tokens for one in shown),
        tokens_per_second=round(sum(one.tokens_per_second() for one in shown), 3),
        misses=misses,
        in_flight=sum(in_flight.values()) if key.operator else sum(in_flight[name] for name in names),
    )


async def _prefixes(server: Server, key: Key) -> tuple[list[PrefixObject], str | None]:
    """The last used ones of the key's namespace and the public one; none while the store is away, and why."""
    if server.prefixes is None:
        return [], None
    found = []
    for namespace in dict.fromkeys((key.namespace, server.settings.public_namespace)):
        try:
            page = await server.prefixes.page(namespace, None, _MOST_PREFIXES)
        except XKVError as error:
            fault = of_fault(error)
            return [], f"{fault.code}: {fault.message}"
        found += page.records
    return [PrefixObject.of(record, server) for record in found], None
