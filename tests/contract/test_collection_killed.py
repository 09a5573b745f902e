"""`kill -9` of collectors and publishers at random points: what is left can be read or is cleaned up."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from artifact_samples import sample
from redis_server import RedisServer

from xkv_artifacts.limits import Limits
from xkv_artifacts.store import ArtifactStore

WORKER = """
import sys
from xkv_artifacts.limits import Limits
from xkv_artifacts.store import ArtifactStore
if sys.argv[3] == "publish":
    from artifact_samples import sample
with ArtifactStore.open(sys.argv[1], sys.argv[2]) as store:
    print("ready", flush=True)
    while True:
        if sys.argv[3] == "collect":
            store.collect(Limits(budget=300_000))
        else:
            for length in range(20, 60):
                store.publish(*sample(range(length)))
"""
KILLS = 4


def start(store: ArtifactStore, work: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, store.blobs.url, store.redis_url, work],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


@pytest.mark.slow
def test_nothing_is_half_there_after_kills(tmp_path: Path, redis_server: RedisServer) -> None:
    source = random.Random(1)
    with ArtifactStore.open(str(tmp_path / "store"), redis_server.url) as store:
        limits = {"each": {"artifacts": 30}}
        (tmp_path / "store" / "limits.json").write_text(json.dumps(limits))
        pinned = store.publish(*sample(range(10)), pinned=True).id
        for _ in range(KILLS):
            processes = [start(store, work) for work in ("collect", "publish", "collect")]
            for process in processes:
                wait_for(process)
            time.sleep(source.uniform(0.05, 0.4))
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
            store.load(pinned)
            store.collect_orphans()
            blobs = set(store.blobs.ids())
            assert {entry.id for entry in store.entries()} == blobs
            assert all(check.fault is None for check in store.verify())
            usage = store.catalog.namespaces.usage("default")
            assert usage.bytes == sum(store.blobs.sizes()) and usage.artifacts == len(blobs)
        # The dead collectors' leases run out by themselves; nothing else keeps an artifact.
        store.catalog.link.call(
            lambda client: [
                client.delete(key) for key in client.keys(f"xkv:1:{store.catalog.store_id}:lease:*")
            ]
        )
        store.collect(Limits(budget=0))
        assert set(store.blobs.ids()) == {pinned} == {entry.id for entry in store.entries()}
        assert not list((tmp_path / "store" / "tmp").glob("*"))
