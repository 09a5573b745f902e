"""How `xkv serve` ends when it is stopped while it starts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from asking import wait_until
from served import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One that starts."""
    started = Server(tmp_path, "--store", tmp_path / "store", wait=False)
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()
    with suppress(
        FileNotFoundError, ProcessLookupError
    ):  # else it waits a minute for clients that were killed
        os.kill(int((tmp_path / "store" / "catalog" / "redis.pid").read_text()), signal.SIGTERM)


@pytest.mark.parametrize("word", ["redis-server", "raylet", "ServeController"])
def test_one_that_is_stopped_while_it_starts_says_so(server: Server, word: str) -> None:
    """As soon as it has started a process of a kind; all its processes get the signal."""
    if word == "redis-server":
        wait_until(lambda: (server.log.parent / "store" / "catalog" / "redis.pid").exists())
    else:
        wait_until(lambda: bool(server.processes(word)))
    server.terminate_all()
    assert server.process.wait(120) == 0, server.log.read_text()
    assert server.log.read_text() == "stopped before it had started\n"
