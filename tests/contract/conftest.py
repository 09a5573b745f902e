"""A real Redis and a real S3 server for the tests of this folder."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from xkv_artifacts.catalog import Catalog
from xkv_artifacts.embedded import server_binary
from xkv_artifacts.redis_link import RedisLink


class RedisServer:
    """A redis-server process of the test's own, on a unix socket, without persistence."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", *options]
        self._process = subprocess.Popen([server_binary(), *arguments], stdout=subprocess.DEVNULL)
        RedisLink(self.url).call(lambda client: client.ping())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all tests that do not stop it."""
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, not started yet."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def catalog(redis_server: RedisServer) -> Iterator[Catalog]:
    """An empty catalog in the shared Redis."""
    link = RedisLink(redis_server.url)
    yield Catalog(link, uuid.uuid4().hex)
    link.close()
