"""What a server's compressor does for its store from the start on, against a real Redis."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from artifact_samples import sample
from redis_server import RedisServer

from xkv_artifacts.store import ArtifactStore
from xkv_workers.serving.compressor import Compressor


def test_a_redis_that_never_knew_the_store_lists_it_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a minute later: until then no prompt would find a prefix, and nothing would say why."""
    url, manifest_ids = str(tmp_path / "store"), []
    with ArtifactStore.open(url) as store:
        for seed in range(2):
            manifest, tensors = sample(range(seed, seed + 20))
            store.publish(manifest, tensors)
            manifest_ids.append(manifest.id)
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        with ArtifactStore.open(url, redis.url) as store, caplog.at_level(logging.WARNING):
            assert not store.catalog.is_built()
            compressor = Compressor.__new__(Compressor)
            compressor._store, compressor._ending = store, threading.Event()
            thread = threading.Thread(target=compressor._collect, daemon=True)
            thread.start()
            deadline = time.monotonic() + 20
            while not store.catalog.is_built() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert sorted(entry.id for entry in store.entries()) == sorted(manifest_ids)
            compressor._ending.set()
            thread.join()
        assert "did not know this store: 2 prefixes are listed" in caplog.text
    finally:
        redis.kill()
