"""A server of the test's own: `xkv serve` as a process, on a free port, with a Ray of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import httpx
import psutil
from command_runs import PATIENT_RAY

from examples.local_server import free_port

START_SECONDS = 600


def use_factors(base_url: str, document: str) -> None:
    """Ask for what a stored document begins with until its factors are used: from then on they are in memory.

    A slow machine may not load them in time at first; and what was computed instead is kept, and preferred by
    whoever asks for no more of the document. So each question goes a little further than the one before.
    """
    model = httpx.get(f"{base_url}/models", timeout=60).json()["data"][0]["id"]
    for end in range(600, len(document), 20):
        messages = [{"role": "user", "content": document[:end]}]
        body = {"model": model, "messages": messages, "max_tokens": 1}
        answer = httpx.post(f"{base_url}/chat/completions", json=body, timeout=300)
        if answer.status_code == 200 and answer.json()["xkv"]["artifact"]:
            return
        time.sleep(1)
    raise AssertionError(f"its factors are not used: {answer.text}")


def command_of(process: psutil.Process) -> str:
    """Its words; none of one that has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Server:
    """`xkv serve` with some options, until `stop`.

    Args:
        folder: for its log. options: of the command. wait: until it answers.
        environment: besides this process's, without what that has for Ray.
    """

    def __init__(
        self,
        folder: Path,
        *options: object,
        wait: bool = True,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "serve.log"
        # A Ray of its own needs a secret of its own, whatever the tests' shared cluster has.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        words = [sys.executable, "-m", "xkv_cli", "serve", "--port", self.port, *options]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                stdout=output,
                stderr=output,
                env={**alone, **PATIENT_RAY, **environment},
                start_new_session=True,  # as a terminal would: a group that Ctrl-C reaches
            )
        if wait:
            self._wait()

    def metrics(self) -> str:
        """The page that Prometheus reads."""
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def processes(self, words: str = "") -> list[psutil.Process]:
        """Its children's and theirs, with some words in their command."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if words in command_of(child)]

    def engine_process(self) -> psutil.Process:
        """Of one of the replicas."""
        return self.processes("xkv:engine")[0]

    def terminate_all(self) -> None:
        """SIGTERM to all its processes, as systemd sends it; `timeout` does to the group."""
        for process in [psutil.Process(self.process.pid), *self.processes()]:
            with suppress(psutil.NoSuchProcess):  # some last a moment only
                process.terminate()

    def stop(self) -> int:
        """SIGTERM, unless it has ended; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(300)

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=60) as answer:
                    if answer.status == 200 and "status page at" in self.log.read_text():  # it heeds signals
                        return
            except OSError:
                pass
            time.sleep(0.5)
        self.process.kill()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
