"""What precompute survives: killed processes, interruptions, a Redis that goes away, a full disk, a race."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from command_runs import Done, Xkv, words
from redis_server import RedisServer

from xkv_artifacts.store import ArtifactStore

XKV = [sys.executable, "-m", "xkv_cli"]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def arguments(ray_address: str, tiny_model: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """Precompute of eight documents on the shared Ray."""
    for number in range(5):
        (corpus / f"more{number}.txt").write_text(words(1200, seed=30 + number))
    common = ["--docs", corpus, "--model", tiny_model, "--store", tmp_path / "store"]
    return [
        "precompute",
        *map(str, common),
        "--ratio",
        "2",
        "--workers",
        "1",
        "--ray-address",
        ray_address,
        "--json",
    ]


def blobs(store: Path) -> set[str]:
    return {path.stem for path in store.glob("prefixes/*/*")}


def when(condition: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Do something in a thread as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_an_interrupted_run_goes_on_where_it_stopped(
    arguments: list[str], xkv: Xkv, corpus: Path, tmp_path: Path
) -> None:
    for number in range(24):  # far more than a fast machine finishes before the signal arrives
        (corpus / f"many{number}.txt").write_text(words(1500, seed=100 + number))
    store = tmp_path / "store"
    run = subprocess.Popen([*XKV, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    when(lambda: blobs(store), lambda: run.send_signal(signal.SIGINT)).join()
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out) == (130, "")
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err
    before = blobs(store)
    with ArtifactStore.open(str(store)) as opened:
        leases = opened.catalog.link.call(lambda client: list(client.scan_iter("*:lease:*")))
    assert leases == [], "an interrupted run gives its leases back"

    report = xkv(*arguments).json
    assert report["failed"] == 0 and report["computed"] + report["reused"] == 32
    assert report["reused"] >= len(before) > 0


@pytest.mark.slow
@pytest.mark.long
def test_killed_drivers_and_workers_lose_nothing(tiny_model: Path, tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "crash_test.py"
    command = [sys.executable, str(tool), "--points", "2", "--documents", "8", "--model", str(tiny_model)]
    command += ["--json", str(tmp_path / "crash_test.json")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "crash_test.json").read_text())
    assert len(written["rows"]) == 2 and {"command", "machine", "versions"} <= set(written)


def test_a_document_that_kills_its_worker_is_given_up_and_the_others_finish(
    arguments: list[str], xkv: Xkv, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deadly_worker
    import ray.cloudpickle

    from xkv_workers import worker

    (corpus / "deadly.txt").write_text("deadly " * 40)
    (corpus / "strange.txt").write_text("strange " * 40)
    monkeypatch.setattr(worker, "PrefixWorker", deadly_worker.DeadlyWorker)
    with by_value(ray.cloudpickle, deadly_worker):
        done = xkv(*arguments)
    report = done.json
    assert (done.code, report["computed"], report["failed"]) == (1, 8, 2)
    reasons = {error["document"]: error["reason"] for error in report["errors"]}
    assert "process died" in reasons["corpus/deadly.txt"] and "3 tries" in reasons["corpus/deadly.txt"]
    assert "ZeroDivisionError: by a strange document" in reasons["corpus/strange.txt"]


class by_value:  # noqa: N801 - reads as the words it is
    """Ship a module's classes to Ray workers by value: they cannot import the tests."""

    def __init__(self, cloudpickle: ModuleType, module: ModuleType) -> None:
        self._cloudpickle, self._module = cloudpickle, module

    def __enter__(self) -> None:
        self._cloudpickle.register_pickle_by_value(self._module)

    def __exit__(self, *exception: object) -> None:
        self._cloudpickle.unregister_pickle_by_value(self._module)


@pytest.mark.slow
def test_four_processes_on_one_corpus_compute_each_document_once(
    arguments: list[str], tmp_path: Path
) -> None:
    runs = [
        subprocess.Popen([*XKV, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    reports = []
    for run in runs:
        out, err = run.communicate(timeout=600)
        assert run.returncode == 0, err
        reports.append(json.loads(out))
    assert sum(report["computed"] for report in reports) == 8
    assert all(report["computed"] + report["reused"] == 8 for report in reports)
    assert len(blobs(tmp_path / "store")) == 8


def test_redis_lost_in_mid_run_and_back_empty(
    arguments: list[str], xkv: Xkv, redis_server: RedisServer, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def restart() -> None:
        redis_server.kill()
        time.sleep(1.5)
        redis_server.start()

    redis = ["--redis", redis_server.url]
    restarting = when(lambda: blobs(store), restart)
    done = xkv(*arguments, *redis)
    restarting.join()
    assert done.code == 0, done.err
    assert done.json["computed"] == 8

    redis_server.kill()
    redis_server.start()
    listed = xkv("ls", "--store", store, *redis, "--json").json
    assert listed["artifacts"] == []
    again = xkv(*arguments, *redis).json
    assert (again["computed"], again["reused"]) == (0, 8), "blobs are found without the catalog"

    redis_server.kill()
    redis_server.start()
    rebuilt = xkv("index", "rebuild", "--store", store, *redis, "--json")
    assert (rebuilt.code, rebuilt.json) == (0, {"artifacts": 8, "calibrations": 0, "failed": 0, "faults": []})
    assert len(xkv("ls", "--store", store, *redis, "--json").json["artifacts"]) == 8


@pytest.mark.slow
@pytest.mark.long
def test_redis_lost_in_mid_run_for_good(
    arguments: list[str], xkv: Xkv, redis_server: RedisServer, tmp_path: Path
) -> None:
    store, redis = tmp_path / "store", ["--redis", redis_server.url]
    killing = when(lambda: blobs(store), redis_server.kill)
    done = xkv(*arguments, *redis)
    killing.join()
    assert (done.code, done.out) == (1, "")
    error, hint = done.err.splitlines()[-2:]  # before them a note, when a worker found out first
    assert error.startswith("error: Redis at unix:") and "does not answer" in error
    assert hint.startswith("hint: start Redis") and "Traceback" not in done.err

    redis_server.start()
    again = xkv(*arguments, *redis).json
    assert again["failed"] == 0 and again["computed"] + again["reused"] == 8
    assert again["reused"] > 0, "what was published before is there"


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_blob(
    arguments: list[str], xkv: Xkv, redis_server: RedisServer, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        done = xkv(*arguments, "--store", small / "store", "--redis", redis_server.url)
        report = done.json
        assert done.code == 1 and report["failed"] > 0
        assert all("no space left" in error["reason"] for error in report["errors"])
        assert len(blobs(small / "store")) == report["computed"]
        assert list((small / "store" / "tmp").iterdir()) == []
        verified: Done = xkv("verify", "--store", small / "store", "--redis", redis_server.url, "--json")
        assert verified.code == 0 and verified.json["artifacts"] == report["computed"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
