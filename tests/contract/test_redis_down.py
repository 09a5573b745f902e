"""A Redis that does not answer: one clear line at the start, patience in mid-run, never a password."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from artifact_samples import sample
from redis_server import RedisServer

from xkv_artifacts.errors import CatalogError, CatalogUnavailable
from xkv_artifacts.redis_link import DEFAULT_PATIENCE_S, RedisLink, mask_password
from xkv_artifacts.store import ArtifactStore


def test_down_at_the_start_is_told_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(CatalogUnavailable, match=r"127.0.0.1:1/0 does not answer") as caught:
        ArtifactStore.open(str(tmp_path / "s"), "redis://user:secret@127.0.0.1:1/0")
    assert time.monotonic() - begin < DEFAULT_PATIENCE_S / 2
    assert "secret" not in str(caught.value) and "XKV_REDIS_URL" in caught.value.hint


@pytest.mark.parametrize(
    "url", ["http://x", "nonsense", "redis://h:port", "redis://127.0.0.1:1/x?y=secret", "redis://[secret"]
)
def test_what_is_no_redis_url_is_told(tmp_path: Path, url: str) -> None:
    with pytest.raises(CatalogUnavailable) as caught:
        ArtifactStore.open(str(tmp_path / "s"), url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_no_redis_is_told(tmp_path: Path) -> None:
    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(CatalogUnavailable, match=r"what answers at .* is no Redis") as caught:
            ArtifactStore.open(str(tmp_path / "s"), f"redis://127.0.0.1:{server.getsockname()[1]}/0")
    assert "give the address of a Redis" in caught.value.hint


def test_the_environment_names_the_redis(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XKV_REDIS_URL", redis_server.url)
    with ArtifactStore.open(str(tmp_path / "s")) as store:
        assert store.redis_url == redis_server.url
    assert not (tmp_path / "s" / "catalog").exists()


def test_a_pause_in_mid_run_is_waited_out(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "s"), own_redis.url) as store:
        own_redis.kill()
        later = threading.Timer(1.0, own_redis.start)
        later.start()
        manifest, tensors = sample()
        store.publish(manifest, tensors)
        later.join()
        assert [entry.id for entry in store.entries()] == [manifest.id]


def test_leaving_a_lease_does_not_wait_for_a_redis_that_is_gone(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    own_redis.start()
    with ArtifactStore.open(str(tmp_path / "s"), own_redis.url) as store:
        lease = store.catalog.lease("0" * 64, "me", 0.3)
        assert lease is not None
        with lease:
            own_redis.kill()
            time.sleep(0.5)  # a renewal is on its way
            begin = time.monotonic()
        assert time.monotonic() - begin < DEFAULT_PATIENCE_S / 2 and lease.lost


def test_a_redis_that_stays_away_ends_in_one_clear_error_and_nothing_is_lost(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    own_redis.start()
    manifest, tensors = sample()
    with ArtifactStore.open(str(tmp_path / "s"), own_redis.url, patience_s=0.5) as store:
        own_redis.kill()
        begin = time.monotonic()
        with pytest.raises(CatalogUnavailable, match="does not answer"):
            store.publish(manifest, tensors)
        assert 0.2 < time.monotonic() - begin < DEFAULT_PATIENCE_S / 2
        assert store.load(manifest.id)[0].id == manifest.id  # blobs are read without the catalog
        own_redis.start()
        entry = store.get(manifest.id)
        assert entry is not None and store.entries() == [entry]


def test_a_wrong_password_is_told_without_waiting(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start()
    RedisLink(own_redis.url).call(lambda client: client.config_set("requirepass", "right"))
    begin = time.monotonic()
    for url in (own_redis.url, own_redis.url.replace("unix://", "unix://:wrong@")):
        with pytest.raises((CatalogUnavailable, CatalogError)) as caught:
            ArtifactStore.open(str(tmp_path / "s"), url)
        assert "wrong@" not in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - begin < DEFAULT_PATIENCE_S / 2


def test_a_full_redis_is_one_clear_error(tmp_path: Path, own_redis: RedisServer) -> None:
    own_redis.start("--maxmemory", "1kb")
    with (
        ArtifactStore.open(str(tmp_path / "s"), own_redis.url) as store,
        pytest.raises(CatalogError, match="OOM|memory"),
    ):
        store.catalog.remember_rate("f", "cpu", 1.0)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://me:se@cr:et@h/0?password=x", "rediss://me:***@h/0"),
        ("unix://:secret@/run/r.sock?db=1", "unix://:***@/run/r.sock"),
        ("unix:///run/r.sock", "unix:///run/r.sock"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert mask_password(url) == shown
