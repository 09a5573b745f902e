"""The one server of a Ray, and the Serve instance that it runs on: claimed, started, and ended again."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any, Final

from xkv_workers.errors import ServerFailed
from xkv_workers.serving.logs import LogFormat, serve_logging
from xkv_workers.serving.settings import APP
from xkv_workers.serving.state_board import StateBoard

_log = logging.getLogger(__name__)
BOARD: Final = "xkv-state-board"
NAMESPACE: Final = "xkv"
"""Of Ray's names: replicas look the board up from whatever job Serve was started in."""
_CLAIM_S: Final = 30.0
"""For the board of a server that was killed to go, which it does with its process; that of a machine that
died does when Ray has missed it for some 20 s."""

_LOOK_S: Final = 5.0
"""For Serve's controller to tell what runs: one that hangs, or comes back, is no sign that nothing does."""
_GONE_S: Final = 60.0
"""Beyond the 30 s that Serve's own shutdown waits: engines may store their tails for 20 s (a guess)."""


def claim_board() -> Any:
    """The state board of a Ray, which one process at a time has: the server's, until that ends.

    Raises:
        ServerFailed: another server runs on this Ray.
    """
    import ray
    from ray.exceptions import ActorAlreadyExistsError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node, since it is to be there as long as this process, whatever workers come and go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # One whose process is killed comes back empty; replicas tell it anew within a second.
    board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(StateBoard).options(
        name=BOARD, namespace=NAMESPACE
    )
    end = time.monotonic() + _CLAIM_S
    while True:
        try:
            return board.remote()
        except ActorAlreadyExistsError:
            if time.monotonic() > end:
                message = "another xkv serve runs on this Ray, and a second one would take its place"
                raise ServerFailed(message, hint="end that one first, or use another cluster") from None
        time.sleep(0.5)


def start_serve(host: str, port: int, log_format: LogFormat) -> None:
    """Have Serve listen, at the head of the cluster alone.

    One that runs nothing but what a killed server left there, or nothing at all, is ended first: it would
    keep its address, and it may be about to end.

    Raises:
        ServerFailed: Serve runs other applications elsewhere, or one that was left does not end.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        found = running.http_config
        if not _others():
            serve.shutdown()
            _wait_until_gone()
        elif (found.host, found.port) != (host, port):
            raise ServerFailed(
                f"Serve runs other applications on this Ray, and listens at {found.host}:{found.port} alone",
                hint=f"give --host {found.host} --port {found.port}, or use another cluster",
            )
    # Elsewhere proxies would listen wherever a replica is, on machines that nobody opened.
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=host, port=port),
        logging_config=serve_logging(log_format),
    )
    found = _get_global_client().http_config  # one that has not ended keeps its own
    if (found.host, found.port) != (host, port):
        raise ServerFailed(
            f"Serve of this Ray still listens at {found.host}:{found.port}, and does not end",
            hint="try again in a minute, or run `serve shutdown` there",
        )


def _wait_until_gone() -> None:
    """Until the controller has ended, which goes on doing so when `serve.shutdown` no longer waits.

    Raises:
        ServerFailed: it takes too long.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    end = time.monotonic() + _GONE_S
    while time.monotonic() < end:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        except ValueError:
            return
        time.sleep(0.2)
    raise ServerFailed(
        f"what another server left on Serve has not ended in {_GONE_S:g} s",
        hint="try again in some minutes, or run `serve shutdown` there",
    )


def end_serve(*, shared: bool) -> None:
    """End the server's application, and Serve with it unless that runs others.

    Args:
        shared: the Ray goes on.
    """
    from ray import serve
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import RayServeException

    try:
        if shared:
            with suppress(RayServeException):  # it had not come up
                serve.delete(APP)
        if not shared or not _others():
            serve.shutdown()
    except TimeoutError:  # of the deletion; a Serve that is shutting down takes no other server, and may last
        _log.warning("replicas that do not end yet hold their places in the cluster for some minutes")
    except ActorDiedError:  # somebody has ended Serve
        pass


def has_application() -> bool:
    """Whether Serve has the server's application, and does not take it down."""
    import ray
    from ray.exceptions import ActorDiedError, RayError
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    try:
        asked = client._controller.get_serve_instance_details.remote()  # serve.status has no limit of time
        found = ray.get(asked, timeout=_LOOK_S)["applications"].get(APP)
    except ActorDiedError:  # Serve was shut down
        return False
    except RayError:  # its controller is late, or comes back
        return True
    return found is not None and found["status"] != ApplicationStatus.DELETING


def _others() -> list[str]:
    """Applications of Serve beside the server's."""
    from ray import serve

    return [name for name in serve.status().applications if name != APP]
