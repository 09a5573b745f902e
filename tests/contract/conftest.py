"""A real Redis for the tests of this folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer

from xkv_artifacts.catalog import Catalog
from xkv_artifacts.redis_link import RedisLink


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
