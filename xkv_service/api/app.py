"""`create_app`: the HTTP API over a backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.routing import APIRoute

from xkv_service.api import error_handlers
from xkv_service.api.admission import Admission
from xkv_service.api.backend import Backend, PrefixService
from xkv_service.api.body_limit import BodyLimit
from xkv_service.api.doorkeeper import Doorkeeper
from xkv_service.api.drain import DrainGate
from xkv_service.api.generation_routes import generation_routes
from xkv_service.api.health_routes import health_routes
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.metrics import Metrics
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_routes import prefix_routes
from xkv_service.api.request_log import RequestLog
from xkv_service.api.server import Server
from xkv_service.api.settings import APISettings
from xkv_service.api.status_routes import status_routes
from xkv_service.api.traffic import Traffic

_SHARE = 4
"""No key has more than this part of the bytes of bodies: two of them leave half to others."""


def create_app(
    model: ServedModel,
    backend: Backend,
    *,
    finder: PrefixFinder | None = None,
    prefixes: PrefixService | None = None,
    keys: KeyRing | None = None,
    settings: APISettings | None = None,
    most_requests: int = 272,
    ids_sent: bool = False,
) -> FastAPI:
    """The ASGI app. It keeps counters, and nothing that another copy of it would have to know.

    Its `state.drain` is a `Drain`, by which whoever runs the app ends it.

    Args:
        model: what is served. backend: runs it.
        finder: looks prompts up; None: no stored prefixes are used. It is closed with the app.
        prefixes: makes and keeps prefixes; None: /v1/prefixes answers 501. It is closed with the app.
        keys: who may enter; None or empty: everybody on this machine.
        settings: limits and times.
        most_requests: under way at once, of all keys; more are refused (503). By default the 16 that an
            engine runs, and 16 that wait for each of them.
        ids_sent: whether a proxy before the app sends the `x-request-id` of each request back.
    """
    keys, settings, metrics = keys or KeyRing(), settings or APISettings(), Metrics()
    share = settings.max_held_bytes // (1 if len(keys.keys) < 2 else _SHARE)
    admission = Admission(most_requests, settings.max_held_bytes, share)
    server = Server(model, backend, finder, prefixes, keys, settings, metrics, Traffic(metrics), admission)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(
        title="xKV service",
        summary="OpenAI's API over compressed prefixes.",
        version=_version(),
        docs_url=None,  # its scripts come from another server
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    app.state.drain = server.drain
    error_handlers.install(app)
    routers = [make(server) for make in (generation_routes, prefix_routes, health_routes, status_routes)]
    routes = [*app.routes, *(route for router in routers for route in router.routes)]
    for router in routers:
        app.include_router(router)
    # The last one added is the first to see a request.
    app.add_middleware(
        BodyLimit,
        admission=admission,
        max_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
    )
    app.add_middleware(Doorkeeper, keys=keys, settings=settings)
    app.add_middleware(DrainGate, drain=server.drain)
    app.add_middleware(RequestLog, routes=routes, metrics=metrics, ids_sent=ids_sent)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _version() -> str:
    try:
        return version("xkv-service")
    except PackageNotFoundError:  # run from a checkout
        return "0"
