"""Start the server, say where it is, and take it down again."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xkv_artifacts.errors import CatalogError, CatalogUnavailable
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.keys import OPEN_NAMESPACE, KeyRing
from xkv_service.api.settings import LOCAL_HOSTS, APISettings
from xkv_service.engine.settings import EngineSettings
from xkv_service.errors import InvalidSpec
from xkv_workers.cluster import Crew, cluster, has_ended, plan_replicas
from xkv_workers.errors import RayUnavailable, ServerFailed, TakenDown
from xkv_workers.messages import Device, ModelPlace
from xkv_workers.serving.logs import LogFormat
from xkv_workers.serving.proxy_guard import CALLBACK, VARIABLE
from xkv_workers.serving.scaling import Scaling
from xkv_workers.serving.settings import APP, ServeSettings, most_requests_each

if TYPE_CHECKING:
    from xkv_workers.model_choice import ChosenModel

_log = logging.getLogger(__name__)
_BUNDLED = "xkv-demo"
"""A name of the bundled model besides that of its folder."""
_LONGEST_NAME = 256

_RAY_SETTINGS = {
    # Ray's 15 is for batches: answers must not wait for them.
    "RAY_worker_niceness": "0",
    # After Ray's 0.1 s the requests of a busy replica go to another one, which has to load their prefix.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    # Workers have the jemalloc that comes with Ray; what was free for a second it gives back. glibc keeps the
    # gaps between tensors that come and go.
    "RAY_LD_PRELOAD_ON_WORKERS": "1",
    "MALLOC_CONF": "background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0",
    VARIABLE: CALLBACK,
}
"""For a Ray that is started here. What the user has set stays."""


@dataclass(frozen=True)
class ServeRequest:
    """What to serve, and where. The fields are the options of `xkv serve`.

    Args:
        model: None is the bundled one. redis_url: None is the embedded one.
        ray_address: None starts a Ray here.
        keys: a file; None: `KEYS_VARIABLE`, else nobody needs a key.
        scaling: how many engine replicas there are.

    Raises:
        InvalidSpec: an alias that is no name, or more requests for a replica than there can be.
    """

    store_url: str
    redis_url: str | None = None
    ray_address: str | None = None
    model: str | None = None
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    scaling: Scaling = field(default_factory=Scaling)
    prefix_bytes: int = 2**30
    engine: EngineSettings = field(default_factory=EngineSettings)
    api: APISettings = field(default_factory=APISettings)
    log_format: LogFormat = "json"

    def __post_init__(self) -> None:
        for alias in self.aliases:
            if not alias.strip() or not alias.isprintable() or len(alias) > _LONGEST_NAME:
                raise InvalidSpec(
                    f"--alias {alias[:_LONGEST_NAME]!r} is no name for a model",
                    hint="give the name that requests will say",
                )
        most, target = most_requests_each(self.engine), self.scaling.target_requests or 1
        if target > most:
            raise InvalidSpec(
                f"target_requests={target} would bring no replica: a server takes {most} for each",
                hint=f"use 1 to {most}, or a larger max_running",
            )


@dataclass(frozen=True)
class Serving:
    """A server that answers.

    Args:
        url: where. model: its name. store_url: of the prefixes. replicas: started.
        logs: the folder with the logs of its processes, on this machine.
        own_ray: whether it has a Ray of its own, which may end by itself.
        open: whether nobody needs a key.
        notes: lines about what may not be as its operator thinks: it cannot have the most replicas that it
            may, no key uses prefixes that are stored, or memory is given for what only GPUs do.
    """

    url: str
    model: str
    store_url: str
    replicas: int
    logs: str
    own_ray: bool
    open: bool
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """See whether it goes on.

        Raises:
            ServerFailed: its own Ray has ended. TakenDown: it is no longer on the Serve of a shared one.
        """
        from xkv_workers.serving.instance import has_application

        if self.own_ray and has_ended():
            raise ServerFailed("the server has ended: its Ray is gone", hint=f"its logs are in {self.logs}")
        if not self.own_ray and not has_application():
            raise TakenDown(
                "the server has ended: somebody took it off Serve",
                hint="start it again; `serve shutdown` ends all that a Ray serves",
            )


@contextmanager
def serving(request: ServeRequest) -> Iterator[Serving]:
    """The server, while the block runs. Everything that can be wrong is found before Ray is started.

    Raises:
        XKVError: a model, store, keys file or address that cannot be used, or Ray does not start.
    """
    keys = KeyRing.read(request.keys)
    _check_address(request, keys)
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        store = stack.enter_context(ArtifactStore.open(request.store_url, request.redis_url))
        store.limits()  # a file of them that cannot be read is found now
        stack.enter_context(store.keeping_catalog())
        # Not before: it brings torch, for which no error above has to wait.
        from xkv_workers.model_choice import choose_device, choose_model

        room = None
        if request.ray_address:
            room = stack.enter_context(cluster(request.ray_address, own_sigterm=True))
        model = choose_model(request.model, request.revision, choose_device(request.device, room))
        if room is not None and room.nodes > 1 and store.redis_url.startswith("unix:"):
            raise RayUnavailable(
                f"{room.nodes} machines cannot share the embedded Redis of this one",
                hint="give --redis or XKV_REDIS_URL a Redis that all of them reach",
            )
        room = room or stack.enter_context(cluster(own_sigterm=True))
        crew, shortage = plan_replicas(room, model.device, request.scaling.least, request.scaling.most)
        settings = _settings(request, model, store, crew, keys)
        stack.enter_context(_application(request, settings))
        yield Serving(
            url=f"http://{_shown(request.host)}:{request.port}",
            model=_BUNDLED if request.model is None else model.files.identity.name,
            store_url=store.blobs.url,
            replicas=settings.scaling.least,
            logs=_logs(),
            own_ray=request.ray_address is None,
            open=keys.is_open,
            notes=tuple(filter(None, (shortage, unread(store, keys), unrebuilt(request, model.device)))),
        )


def unread(store: ArtifactStore, keys: KeyRing) -> str | None:
    """That prefixes which were made without saying for whom are no key's, if they are."""
    if keys.is_open or OPEN_NAMESPACE in (key.namespace for key in keys.keys):
        return None
    with suppress(CatalogUnavailable, CatalogError):
        if store.catalog.oldest(0, OPEN_NAMESPACE):
            return (
                f"no key uses the prefixes of namespace {OPEN_NAMESPACE}: give it to one, or make them with "
                "xkv precompute --namespace public"
            )
    return None


def unrebuilt(request: ServeRequest, device: Device) -> str | None:
    """That memory is given for what no engine rebuilds on such a device, if it is."""
    if device == "cuda" or not request.engine.rebuilt_bytes:
        return None
    return (
        "--rebuilt-memory does nothing here: the engines run on CPUs, and only on GPUs are prefixes rebuilt"
    )


def _check_address(request: ServeRequest, keys: KeyRing) -> None:
    published = request.api.published
    option, address = ("--published", published) if published else ("--host", request.host)
    if keys.is_open and address.strip("[]") not in LOCAL_HOSTS and not request.api.open_network:
        raise InvalidSpec(
            f"{option} {address} lets other machines in, and there are no keys",
            hint="give --keys, or --open-network if the network may use it",
        )
    if request.ray_address is None:  # else it is for the cluster's head to listen
        _check_port(request)


def _check_port(request: ServeRequest) -> None:
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((request.host, request.port))
        except OSError as error:
            raise InvalidSpec(
                f"{request.host}:{request.port} cannot be used: {error.strerror or error}",
                hint="give another --host or --port",
            ) from None


def _settings(
    request: ServeRequest, model: ChosenModel, store: ArtifactStore, crew: Crew, keys: KeyRing
) -> ServeSettings:
    place = ModelPlace(
        model=model.place,
        revision=request.revision,
        dtype=model.dtype,
        fingerprint=model.fingerprint,
        device=model.device,
        threads=crew.threads,
        store_url=store.blobs.url,
        redis_url=store.redis_url,
    )
    return ServeSettings(
        place,
        aliases=request.aliases if request.model else (*request.aliases, _BUNDLED),
        engine=request.engine,
        api=request.api,
        prefix_bytes=request.prefix_bytes,
        scaling=request.scaling,
        keys=keys,
        log_format=request.log_format,
    )


@contextmanager
def _application(request: ServeRequest, settings: ServeSettings) -> Iterator[None]:
    """The deployments, up and answering."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from xkv_workers.serving.application import build_application
    from xkv_workers.serving.instance import claim_board, start_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    board = claim_board()
    try:
        try:
            start_serve(request.host, request.port, settings.log_format)
            serve.run(build_application(settings, board), name=APP, route_prefix="/")
        except (RuntimeError, RayError, RayServeException) as error:
            raise ServerFailed(
                f"the server did not come up: {_last_line(error)}",
                hint=f"its logs are in {_logs()}",
            ) from None
        yield
    except TakenDown:  # by whoever ends the rest
        raise
    except BaseException:
        _end(request)
        raise
    else:
        _end(request)


def _end(request: ServeRequest) -> None:
    from xkv_workers.serving.instance import end_serve

    shared = request.ray_address is not None
    if shared or not has_ended():
        end_serve(shared=shared)


def _last_line(error: Exception) -> str:
    """What went wrong; Ray has the traceback of another process before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:300]


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _logs() -> str:
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    return str(Path(node.get_session_dir_path()) / "logs" / "serve") if node else "the session folder of Ray"
