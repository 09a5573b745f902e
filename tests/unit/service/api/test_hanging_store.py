"""A store that hangs holds up those who ask about prefixes, and nobody else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from engines import PacedBackend
from redis_server import RedisServer
from rivers import SETTINGS
from serving import serve

from xkv_artifacts.store import ArtifactStore
from xkv_service.api import stored_prefixes
from xkv_service.api.app import create_app
from xkv_service.api.backend import NewPrefix, PrefixRecord
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.modeling.models import LoadedModel

POLLS = 40
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}


class Nobody:
    """Makes no prefix: none is asked for."""

    async def create(self, new: NewPrefix) -> PrefixRecord:
        raise NotImplementedError


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.thaw()
    server.kill()


@pytest.fixture
def client(
    tmp_path: Path, redis: RedisServer, loaded: LoadedModel, served_model: ServedModel, backend: PacedBackend
) -> Iterator[httpx.Client]:
    """Of a server over that Redis."""
    with ArtifactStore.open(str(tmp_path / "store"), redis.url, patience_s=0.0) as store:
        settings = replace(SETTINGS, lookup_timeout_s=0.5)
        app = create_app(
            served_model,
            backend,
            finder=PrefixFinder(store, loaded.identity, settings),
            prefixes=StoredPrefixes(store, Nobody()),
            settings=settings,
        )
        with serve(app) as served, served.http() as found:
            yield found


def test_a_chat_waits_for_nobody_who_asks_a_redis_that_hangs(
    client: httpx.Client, redis: RedisServer
) -> None:
    assert client.get("/status").json()["prefixes_error"] is None
    redis.freeze()
    with ThreadPoolExecutor(POLLS) as pool:
        paths = ("/status", "/v1/prefixes", f"/v1/prefixes/{'ab' * 32}")
        polls = [pool.submit(client.get, paths[number % len(paths)], timeout=300) for number in range(POLLS)]
        time.sleep(1)  # they are on their way
        answer = client.post("/v1/chat/completions", json=CHAT, timeout=300)
        waiting = sum(not poll.done() for poll in polls)
        redis.thaw()
        ends = [poll.result() for poll in polls]
    assert answer.status_code == 200 and answer.json()["xkv"]["miss"]["reason"] == "unavailable"
    assert waiting > POLLS / 2, "it was answered before most of them"
    for end in ends:
        error = end.json().get("prefixes_error") or str(end.json().get("error", "none"))
        assert "store_unavailable" in error or end.status_code in (200, 404)


def test_who_waits_behind_those_is_told_in_time(
    client: httpx.Client, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_prefixes, "_CALL_S", 1.0)
    redis.freeze()
    refused = client.get("/v1/prefixes", timeout=60)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "store_unavailable"
    assert "retry-after" in refused.headers
    redis.thaw()
    end = time.monotonic() + 60
    while client.get("/v1/prefixes", timeout=60).status_code != 200:
        assert time.monotonic() < end
