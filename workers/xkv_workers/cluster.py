"""Starting Ray on this machine, or joining a cluster: quiet, and never longer than a stated time."""

from __future__ import annotations

import atexit
import fcntl
import io
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xkv_workers.errors import RayUnavailable
from xkv_workers.messages import Device

CONNECT_SECONDS = 120
"""For Ray's own check of an address where somebody listens. It imports all of Ray first: 1.4 s of a
processor, but 10 s on two cores with a load of 4 (by hand); the rest is a guess."""

_OBJECT_STORE_BYTES = 128 * 2**20
"""Documents cross as token ids, so Ray's shared memory stays small."""

MOST_SMALL = 4
"""Workers of a small model on one machine, unless more are asked for."""

_STARTS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What the cluster can give: alive nodes, their CPUs and GPUs, and the CPUs of the smallest node that has
    any.

    Args:
        bare_nodes: of the nodes, those that give no CPU to run on, such as a head or a driver's.
    """

    nodes: int
    cpus: int
    gpus: int
    node_cpus: int
    bare_nodes: int = 0


@contextmanager
def cluster(address: str | None = None, *, own_sigterm: bool = False) -> Iterator[Room]:
    """Ray, started here or joined at `address` ("host:port" or "auto"), and left again at the end.

    Args:
        own_sigterm: SIGTERM is for this process alone, and its handler stays. The processes of a Ray that was
            started here are killed at its end then: they would not hear it.

    Raises:
        RayUnavailable: it does not start, or nothing answers at the address.
    """
    _set_defaults(address)
    import ray

    with redirect_stdout(_LogLines()):  # Ray prints workers' deaths on stdout, which is for results
        with _sigterm_for_us_alone() if own_sigterm else nullcontext():
            _connect(address)
        try:
            yield _room()
        finally:
            if address is None and has_ended():
                atexit.register(_exit_without_ray)
            else:
                if own_sigterm and address is None:
                    _kill_at_shutdown()
                ray.shutdown()


def _kill_at_shutdown() -> None:
    """Have Ray's shutdown kill its processes, and not give each of them a second to hear SIGTERM."""
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    kill = getattr(node, "kill_all_processes", None)
    if node is not None and kill is not None:
        node.kill_all_processes = lambda **_: kill(check_alive=False)


def _exit_without_ray() -> None:
    """End this process at once. Ray would wait a minute for what is gone, and its threads crash later."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def has_ended() -> bool:
    """Whether the Ray that was started here is gone: its head takes no connections, or knows of no node that
    is alive. What is left of its processes ends with this one."""
    import ray

    try:
        _knock(ray.get_runtime_context().gcs_address)
    except ConnectionRefusedError:
        return True
    except OSError:  # a busy machine
        return False
    return not any(node["Alive"] for node in ray.nodes())


def _set_defaults(address: str | None) -> None:
    """Ray's switches, which it reads when it is imported; what the user has set stays.

    A Ray of our own gets a secret of its own: other users of the machine cannot reach it, and no token file
    is left in the home folder, where it would lock Rays that are started later.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning on every start
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif _health(address).wants_token:
        os.environ["RAY_AUTH_MODE"] = "token"


def _connect(address: str | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address is None:
            _start(quiet)
            return
        if fault := _health(address).fault:  # `ray.init` alone would try for minutes
            raise ConnectionError(fault)
        ray.init(address=address, **quiet)
    except Exception as error:  # noqa: BLE001 - Ray raises plain Exception, among many others
        where = f"at {address}" if address else "on this machine"
        raise RayUnavailable(
            f"Ray does not start {where}: {' '.join(str(error).split())[:300]}",
            hint="see `xkv doctor`" if address is None else "check --ray-address and `ray status` there",
        ) from None


def _start(quiet: dict[str, Any]) -> None:
    """Start a Ray on this machine, again when it took longer than the 30 s that Ray gives itself."""
    import ray

    for left in reversed(range(_STARTS)):
        try:
            ray.init(
                address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet
            )
            return
        except Exception as error:
            ray.shutdown()
            if not left or "timed out" not in str(error):
                raise


@contextmanager
def _sigterm_for_us_alone() -> Iterator[None]:
    """Processes that are started meanwhile never get SIGTERM.

    `timeout` sends it to a whole group, and systemd to all processes of a service. Ray's must outlive that:
    the process that started them is to end its work with them, and ends them itself. The mask is inherited.
    A handler of our own stays, and gets what Ray's own met meanwhile, which ends the process without a word.
    """
    handler = signal.getsignal(signal.SIGTERM)
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    met = False
    try:
        yield
    except SystemExit:  # another thread of this process had no mask
        met = True
        raise
    finally:
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        if met:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def start_turn() -> Iterator[bool]:
    """Whether it is this process's turn to start a Ray: one at a time on a machine, for each user.

    Eight that start at once on two cores all take longer than Ray gives itself, and none comes up.
    """
    path = Path(tempfile.gettempdir()) / f"xkv-{os.getuid()}-ray.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # in somebody else's way: better all at once than never
        yield True
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except BlockingIOError:
        ours = False
    try:
        yield ours
    finally:
        os.close(lock)


@dataclass(frozen=True)
class _Health:
    """What a Ray at an address said: None for no fault; whether it wants a token that was not sent."""

    fault: str | None = None
    wants_token: bool = False


@cache
def _health(address: str) -> _Health:
    """Ask the Ray at an address ("host:port" or "auto") whether it is there."""
    if "://" in address:
        return _Health()
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    try:
        if address != "auto":
            _knock(address)
            command += ["--address", address]
        subprocess.run(command, check=True, capture_output=True, timeout=CONNECT_SECONDS)
    except OSError as error:
        return _Health(f"nothing answers there: {error.strerror or error}")
    except subprocess.TimeoutExpired:
        return _Health(f"no answer within {CONNECT_SECONDS} s")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "not a healthy Ray cluster"
        return _Health(wants_token=True) if "AuthenticationError" in last else _Health(last)
    return _Health()


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at "host:port"."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise OSError(f'{address!r} is neither "host:port" nor "auto"')
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def _room() -> Room:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(resources.get("CPU", 0)) for resources in nodes]
    return Room(
        nodes=len(nodes),
        cpus=sum(cpus),
        gpus=sum(int(resources.get("GPU", 0)) for resources in nodes),
        node_cpus=min((count for count in cpus if count), default=0),
        bare_nodes=cpus.count(0),
    )


@dataclass(frozen=True)
class Crew:
    """How many workers, and what each gets: a whole GPU, or `threads` CPUs."""

    workers: int
    device: Device
    threads: int


def plan_crew(
    room: Room, device: Device, workers: int | None, *, small: bool = False, what: str = "workers"
) -> Crew:
    """The workers to start: as many as asked for, else one per GPU, or on CPUs one per machine with all its
    cores, of a small model one per core.

    The bundled model on two cores: 41,570 tokens in 37 s with two workers, in 47 s with one that has both.

    Args:
        small: several copies of the model fit into memory without a thought.
        what: they are called, and so is the option that says how many.

    Raises:
        RayUnavailable: a GPU is asked for and there is none, or more workers than fit.
    """
    if device == "cuda":
        _check_room(workers or 1, what, "GPUs", room.gpus)
        return Crew(workers or room.gpus, "cuda", max(room.cpus // room.gpus, 1))
    _check_room(workers or 1, what, "CPUs", room.cpus)
    nodes = room.nodes - room.bare_nodes
    if workers is None:
        workers = nodes * (min(room.node_cpus, MOST_SMALL) if small else 1)
    per_node = -(-workers // nodes)
    return Crew(workers, "cpu", max(room.node_cpus // per_node, 1))


def _check_room(count: int, what: str, kind: str, there: int) -> None:
    if count <= there:
        return
    fewer = f"use --{what} {there} or fewer" if there else "start a node of Ray that has some"
    other = ", or --device cpu" if kind == "GPUs" else ""
    raise RayUnavailable(
        f"{count:,} {what} need as many {kind}; Ray sees {there}",
        hint=f"{fewer}{other}, or join a larger cluster with --ray-address",
    )


def plan_replicas(room: Room, device: Device, least: int, most: int) -> tuple[Crew, str | None]:
    """What each of `least` to `most` replicas gets, which stays as it is while their number changes: its
    share if all run, or, where all do not fit, as much as the least of them can have.

    Returns:
        The crew, and in the second case a line that says so.

    Raises:
        RayUnavailable: the least do not fit, or a GPU is asked for and there is none.
    """
    kind, there = ("GPUs", room.gpus) if device == "cuda" else ("CPUs", room.cpus)
    if least == most or most <= there:
        return plan_crew(room, device, most, what="replicas"), None
    crew = plan_crew(room, device, least, what="replicas")
    each = "one" if device == "cuda" else str(crew.threads)
    return crew, f"no room for {most} replicas: each takes {each} of the {kind}, and Ray sees {there}"


class _LogLines(io.TextIOBase):
    """A stdout that keeps Ray's notices for the log."""

    def write(self, text: str) -> int:
        if text.strip():
            log.debug("%s", text.strip())
        return len(text)
