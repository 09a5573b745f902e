"""The embedded Redis: shared by processes, outlives the killed, ends when not needed, loses nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from artifact_samples import sample

from xkv_artifacts import embedded as module
from xkv_artifacts.embedded import EmbeddedRedis, catalog_folder, embedded_redis_url
from xkv_artifacts.embedded_watch import Connection
from xkv_artifacts.errors import CatalogUnavailable
from xkv_artifacts.store import ArtifactStore

CLIENT = """
import sys, time, hashlib
from xkv_artifacts.store import ArtifactStore
with ArtifactStore.open(sys.argv[1]) as store:
    store.catalog.remember_rate("f", sys.argv[2], float(sys.argv[2]) + 1)
    pid = store.catalog.link.call(lambda client: client.info("server"))["process_id"]
    print(pid, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def store_path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "store"
    pid = server_pid(tmp_path / "store")
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def server_pid(store: Path) -> int | None:
    try:
        with Connection(embedded_redis_url(str(store)).removeprefix("unix://")) as connection:
            info = connection.ask("INFO server")
    except OSError:
        return None
    return int(dict(line.split(":", 1) for line in info.splitlines() if ":" in line)["process_id"])


def client(store: Path, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(store), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_end(pid: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_eight_processes_at_once_share_one_server(store_path: Path) -> None:
    processes = [client(store_path, number) for number in range(8)]
    pids = {int(process.stdout.readline()) for process in processes if process.stdout}
    assert len(pids) == 1
    for process in processes:
        process.communicate("\n", timeout=120)
        assert process.returncode == 0
    wait_for_end(pids.pop())
    with ArtifactStore.open(str(store_path)) as store:
        assert [store.catalog.rate("f", str(number)) for number in range(8)] == [n + 1.0 for n in range(8)]


def test_the_server_outlives_its_killed_starter_and_the_next_command_uses_it(store_path: Path) -> None:
    process = client(store_path, 1)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    time.sleep(0.2)
    assert is_running(pid)
    with ArtifactStore.open(str(store_path)) as store:
        assert server_pid(store_path) == pid
        assert store.catalog.rate("f", "1") == 2.0
    wait_for_end(pid)


def test_a_server_left_alone_by_a_killed_client_ends_by_itself(store_path: Path) -> None:
    embedded = EmbeddedRedis(catalog_folder(str(store_path)), idle_s=0.4)
    pid = server_pid(store_path)
    assert pid is not None
    time.sleep(1.0)
    assert is_running(pid)  # this process is a client, though it does nothing
    embedded._leave()  # what a kill does: the connection is closed without a word
    wait_for_end(pid)


def test_a_server_killed_in_mid_run_comes_back_with_everything(store_path: Path) -> None:
    manifest, tensors = sample()
    with ArtifactStore.open(str(store_path)) as store:
        store.publish(manifest, tensors)
        for number in range(3):
            pid = server_pid(store_path)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            store.catalog.remember_rate("f", str(number), 1.0)
            assert [entry.id for entry in store.entries()] == [manifest.id]
        assert server_pid(store_path) not in (None, pid)
    assert server_pid(store_path) is None
    with ArtifactStore.open(str(store_path)) as store:
        assert store.catalog.rate("f", "2") == 1.0


def test_a_kept_server_comes_back_by_itself_with_what_it_had(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, tensors = sample()

    def back() -> list[str]:
        return [record.message for record in caplog.records if "runs again" in record.message]

    def listed() -> bool:
        with suppress(CatalogUnavailable):
            return [entry.id for entry in store.entries()] == [manifest.id]
        return False

    # Without patience, as a server's HTTP side opens it: no call waits for Redis or starts it.
    with ArtifactStore.open(str(store_path), patience_s=0) as store, store.keeping_catalog():
        store.publish(manifest, tensors)
        for times, lost in enumerate((False, True), start=1):
            kill(store_path)
            if lost:
                (store_path / "catalog" / "catalog.aof").unlink()
            assert seconds_until(lambda times=times: len(back()) == times and listed()) < 10
    assert server_pid(store_path) is None, "nobody brings it back when all have left"
    assert len(back()) == 2
    relisted = [record.message for record in caplog.records if "listed again" in record.message]
    assert relisted == ["the embedded Redis was empty: 1 prefixes are listed again"]


def test_a_kept_server_that_dies_again_and_again_is_tried_ever_more_rarely(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ArtifactStore.open(str(store_path)) as store, store.keeping_catalog():
        monkeypatch.setattr(module, "_OPTIONS", (*module._OPTIONS, "--maxmemory", "nonsense"))
        kill(store_path)
        time.sleep(4)  # tries at 0, 1 and 3 s
        said = [record.message for record in caplog.records if "did not start" in record.message]
        assert 2 <= len(said) <= 3
        monkeypatch.undo()
        assert seconds_until(lambda: server_pid(store_path) is not None) < 10


def kill(store: Path) -> None:
    pid = server_pid(store)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


def seconds_until(condition: Callable[[], object], seconds: float = 60.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come true"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "zeros inside"])
def test_a_damaged_data_file_is_rebuilt_from_the_blobs(store_path: Path, damage: str) -> None:
    samples = [sample(range(number, number + 100)) for number in range(3)]
    with ArtifactStore.open(str(store_path)) as store:
        for manifest, tensors in samples:
            store.publish(manifest, tensors)
    data = store_path / "catalog" / "catalog.aof"
    content = data.read_bytes()
    middle = len(content) // 2
    data.write_bytes(
        {
            "garbage": os.urandom(1000),
            "cut": content[: middle + 3],
            "empty": b"",
            "zeros inside": content[:middle] + bytes(200) + content[middle + 200 :],
        }[damage]
    )
    with ArtifactStore.open(str(store_path)) as store:
        assert {entry.id for entry in store.entries()} == {manifest.id for manifest, _ in samples}
        assert store.lookup(samples[0][0].model.fingerprint, "default", range(100))


def test_a_data_file_damaged_in_mid_run_is_rebuilt_when_somebody_looks(store_path: Path) -> None:
    samples = [sample(range(number, number + 100)) for number in range(3)]
    data = store_path / "catalog" / "catalog.aof"
    with ArtifactStore.open(str(store_path)) as store:
        for manifest, tensors in samples:
            store.publish(manifest, tensors)
        assert store.list_if_lost() is None
        pid = server_pid(store_path)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        content = data.read_bytes()
        data.write_bytes(content[: content.rindex(samples[2][0].id.encode()) - 700])  # and still built
        assert len(store.entries()) < 3 and store.catalog.is_built()
        listed = store.list_if_lost()
        assert listed is not None and listed.artifacts == 3
        assert {entry.id for entry in store.entries()} == {manifest.id for manifest, _ in samples}
        assert store.list_if_lost() is None


def test_leftovers_of_a_crash_do_not_stop_a_start(store_path: Path) -> None:
    with ArtifactStore.open(str(store_path)):
        pid = server_pid(store_path)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        path = Path(embedded_redis_url(str(store_path)).removeprefix("unix://"))
        assert path.exists()
    with ArtifactStore.open(str(store_path)) as store:
        assert store.entries() == []


def test_a_removed_socket_does_not_lock_everybody_out(store_path: Path) -> None:
    with ArtifactStore.open(str(store_path)) as store:
        store.catalog.remember_rate("f", "x", 2.0)
        Path(store.redis_url.removeprefix("unix://")).unlink()
        with ArtifactStore.open(str(store_path)) as other:
            assert other.catalog.rate("f", "x") == 2.0
            assert store.catalog.rate("f", "x") == 2.0
    assert server_pid(store_path) is None


def test_a_worker_given_the_url_is_a_client_like_any_other(store_path: Path) -> None:
    first = ArtifactStore.open(str(store_path))
    second = ArtifactStore.open(str(store_path), first.redis_url)
    first.close()
    pid = server_pid(store_path)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    second.catalog.remember_rate("f", "x", 2.0)
    assert second.catalog.rate("f", "x") == 2.0
    second.close()
    assert server_pid(store_path) is None


def test_processes_with_other_folders_for_temporary_files_share_it_too(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ArtifactStore.open(str(store_path)) as store:
        store.catalog.remember_rate("f", "x", 2.0)
        for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
            monkeypatch.setenv(name, str(tmp_path))
        with ArtifactStore.open(f"file://{store_path}") as other:
            assert other.redis_url == store.redis_url and other.catalog.rate("f", "x") == 2.0


def test_without_a_server_binary_the_error_says_what_to_do(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CatalogUnavailable, match="none can be embedded") as caught:
        ArtifactStore.open(str(store_path))
    assert "XKV_REDIS_URL" in caught.value.hint


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_store_that_cannot_be_written_says_what_to_do(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store_path.mkdir()

    def refuse(self: Path, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who may run this, may write everywhere
    with pytest.raises(CatalogUnavailable, match="cannot run the embedded catalog in .*: ") as caught:
        EmbeddedRedis(store_path / "catalog")
    assert caught.value.hint.startswith("choose a folder that can be written")


def test_a_socket_folder_open_to_others_is_refused(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t" / f"xkv-{os.getuid()}"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    monkeypatch.setattr(module, "_SOCKET_BASE", tmp_path / "t")
    with pytest.raises(CatalogUnavailable, match="only you may enter"):
        ArtifactStore.open(str(store_path))


def test_a_server_that_cannot_start_says_why(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPTIONS", (*module._OPTIONS, "--maxmemory", "nonsense"))
    with pytest.raises(CatalogUnavailable, match="did not start"):
        ArtifactStore.open(str(store_path))
