"""A real Redis and a real S3 server for the tests of this folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Where moto's S3 server answers over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, which the environment points everybody at."""
    import boto3

    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "key"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


@pytest.fixture
def bucket(s3: Any) -> str:
    """A new bucket's name."""
    name = f"b-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=name)
    return name
