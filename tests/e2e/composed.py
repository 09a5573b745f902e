"""The services of docker-compose.yml as processes: their own commands, on free ports of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from command_runs import PATIENT_RAY

from examples.local_server import free_port
from xkv_artifacts.embedded import server_binary

ROOT = Path(__file__).parents[2]
_SHARED_MACHINE = ("--min-worker-port=0", "--max-worker-port=0")
"""Containers have their ports to themselves; nodes of one machine take any that are free."""

_MOST_RESTARTS = 3

_RAN = """
import json, logging, ray
from ray import serve
from ray._private import state
ray.init(address="auto", logging_level=logging.ERROR)
cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes()}
nodes = [(actor["ActorClassName"], actor["Address"]["NodeID"]) for actor in state.actors().values()]
tasks = [(event["cat"], event["tid"]) for event in ray.timeline()]
proxies = list(serve.status().proxies)
print(json.dumps({"cpus": cpus, "nodes": nodes, "tasks": tasks, "proxies": proxies}))
"""


@dataclass(frozen=True)
class Ran:
    """What ran where on the cluster so far, what has ended among it.

    Args:
        cpus: of each node. nodes: class and node of each actor. tasks: name and process of each task.
        proxies: the nodes where Serve listens.
    """

    cpus: dict[str, int]
    nodes: list[tuple[str, str]]
    tasks: list[tuple[str, str]]
    proxies: list[str]

    def nodes_of(self, actor: str) -> list[str]:
        """Of the actors whose class holds a word."""
        return [node for name, node in self.nodes if actor in name]

    def processes_of(self, task: str) -> set[str]:
        """That ran tasks whose name holds a word."""
        return {process for name, process in self.tasks if task in name}


class Composed:
    """Services that are started by name, until `stop`.

    Args:
        folder: for logs and data. environment: of whoever would call `docker compose`: secrets and settings.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        self._folder, self._given = folder, environment
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts = 0
        self._ray_folder = tempfile.mkdtemp(prefix="xkv-ray-")  # short: names of sockets are
        ports = list[int]()
        while len(set(ports)) < 3:  # nobody listens at them yet
            ports = [free_port() for _ in range(3)]
        self.url = f"http://127.0.0.1:{ports[2]}"
        self._places = {
            "redis:6379": f"127.0.0.1:{ports[0]}",
            "ray-head:6380": f"127.0.0.1:{ports[1]}",
            "--port=6380": f"--port={ports[1]}",
            "ray-head:8000": f"127.0.0.1:{ports[2]}",
            "/store": str(folder / "store"),
            "/corpus": str(folder / "corpus"),
        }
        self._redis_port, self._http_port = ports[0], ports[2]

    def start(self, service: str) -> None:
        """Start a service, once more where it runs already, its output in a file of its name."""
        self._spawn(service, f"{service}-{len(self._of(service)) + 1}")

    def _spawn(self, service: str, name: str) -> None:
        with (self._folder / f"{name}.log").open("a") as output:
            self._processes[name] = subprocess.Popen(
                self.command(service),
                stdout=output,
                stderr=output,
                env=self.environment(service),
                cwd=self._folder,
            )

    def wait_healthy(self, service: str, seconds: float = 300.0) -> None:
        """Until the service's own health check succeeds.

        Raises:
            AssertionError: the service ended, or is not healthy in time.
        """
        kind, *words = self._services[service]["healthcheck"]["test"]
        words = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        self._wait(service, lambda: self._run(service, words).returncode == 0, seconds)

    def wait_said(self, service: str, words: str, times: int, seconds: float = 300.0) -> None:
        """Until the service's processes said something so many times. Raises as `wait_healthy`."""
        self._wait(service, lambda: self.log(service).count(words) >= times, seconds)

    def run(self, service: str, *more: str) -> subprocess.CompletedProcess[str]:
        """A service that is a job, to its end."""
        return self._run(service, [*self.command(service), *more], as_is=True)

    def kill(self, service: str) -> None:
        """End a service without a word, what it started in its container with it."""
        for name in self._of(service):
            process = self._processes.pop(name)
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()

    def ran(self) -> Ran:
        """As the cluster says."""
        told = self._run("server", [sys.executable, "-c", _RAN])
        assert told.returncode == 0, told.stderr
        return Ran(**json.loads(told.stdout.splitlines()[-1]))

    def command(self, service: str) -> list[str]:
        """The words that its container would run."""
        found: dict[str, Any] = self._services[service]
        return self._here([*found.get("entrypoint", []), *found["command"]])

    def environment(self, service: str) -> dict[str, str]:
        """What its process sees."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XKV_"))
        }
        for name, value in self._services[service].get("environment", {}).items():
            if value is not None:
                environment[name] = self._here([str(value)])[0]
            elif name in self._given:
                environment[name] = self._given[name]
        path = f"{Path(sys.executable).parent}:{Path(server_binary()).parent}:{os.environ['PATH']}"
        return environment | PATIENT_RAY | {"PATH": path, "RAY_TMPDIR": self._ray_folder}

    def log(self, service: str) -> str:
        """What all of a service said so far."""
        found = [self._folder / f"{name}.log" for name in self._of(service)]
        return "".join(path.read_text(errors="replace") for path in found)

    def stop(self) -> None:
        """End all, the last one first; then Ray's processes of drivers' nodes, which nobody waits for."""
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        until(lambda: not _end_all_with(self._ray_folder))
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def _wait(self, service: str, met: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            assert time.monotonic() < end, self.log(service)
            for name in self._of(service):
                if self._processes[name].poll() is not None:
                    self._start_again(service, name)
            if met():
                return
            time.sleep(0.3)

    def _start_again(self, service: str, name: str) -> None:
        """As the file says: a node of Ray that does not come up in 30 s ends."""
        self._restarts += 1
        restart = self._services[service].get("restart")
        assert restart == "unless-stopped" and self._restarts <= _MOST_RESTARTS, self.log(service)
        self._spawn(service, name)

    def _of(self, service: str) -> list[str]:
        return [name for name in self._processes if name.rpartition("-")[0] == service]

    def _run(
        self, service: str, words: list[str], *, as_is: bool = False
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words if as_is else self._here(words),
            capture_output=True,
            text=True,
            env=self.environment(service),
            cwd=self._folder,
            check=False,
            timeout=900,
        )

    def _here(self, words: list[str]) -> list[str]:
        """The words as compose would fill them in, with this machine's places."""
        here = []
        for word in words:
            word = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: self._given.get(m[1]) or m[2], str(word))
            word = word.replace("$$", "$")
            for place, ours in self._places.items():
                word = word.replace(place, ours)
            word = word.replace("redis-cli", f"redis-cli -p {self._redis_port}")
            word = re.sub(r"\bredis-server\b", f"{server_binary()} --port {self._redis_port}", word)
            word = re.sub(r"(ray start \S+)", rf"\1 {' '.join(_SHARED_MACHINE)}", word)
            here.append(str(self._http_port) if word == "8000" else word)
        return [*here[:-1], *_SHARED_MACHINE, here[-1]] if here[:2] == ["ray", "start"] else here


def _end_all_with(word: str) -> bool:
    """Kill the processes that have a word in their command lines; whether there were any."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word in part for part in process.info["cmdline"] or ())
    ]
    for process in found:
        process.kill()
    psutil.wait_procs(found, 10)
    return bool(found)


def until(met: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)
