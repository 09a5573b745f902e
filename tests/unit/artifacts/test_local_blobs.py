"""A folder of blobs: whole or not at all, whatever happens to the writer, the disk or the permissions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from xkv_artifacts.blobs import CALIBRATIONS, blob_name, id_of_name, local_path, open_blob_store, store_errors
from xkv_artifacts.errors import ArtifactNotFound, StoreError
from xkv_artifacts.local_blobs import LocalBlobStore

ID = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobStore:
    return LocalBlobStore(tmp_path / "store")


def put(blobs: LocalBlobStore, content: bytes = b"blob", artifact_id: str = ID) -> None:
    blobs.put(artifact_id, lambda file: file.write(content))


def files(blobs: LocalBlobStore) -> set[str]:
    return {path.relative_to(blobs.root).as_posix() for path in blobs.root.rglob("*") if path.is_file()}


def test_a_blob_comes_back_and_goes(blobs: LocalBlobStore) -> None:
    assert not blobs.exists(ID) and list(blobs.ids()) == []
    put(blobs)
    put(blobs, b"more", OTHER)
    assert blobs.exists(ID) and list(blobs.ids()) == [ID, OTHER] and blobs.size(ID) == 4
    with blobs.open(ID) as file:
        assert file.read() == b"blob"
    put(blobs, b"again")
    assert blobs.size(ID) == 5
    assert blobs.remove(ID) and not blobs.remove(ID)
    assert files(blobs) == {f"prefixes/cd/{OTHER}.safetensors"}
    for action in (blobs.open, blobs.size, blobs.quarantine):
        with pytest.raises(ArtifactNotFound, match=ID):
            action(ID)


def test_folders_of_a_store_share_nothing_but_the_store(blobs: LocalBlobStore) -> None:
    calibrations = blobs.of(CALIBRATIONS)
    calibrations.put(ID, lambda file: file.write(b"one"))
    put(blobs, b"two two", OTHER)
    assert files(blobs) == {f"calibrations/ab/{ID}.safetensors", f"prefixes/cd/{OTHER}.safetensors"}
    assert list(calibrations.ids()) == [ID] and list(blobs.ids()) == [OTHER]
    assert calibrations.exists(ID) and not blobs.exists(ID) and calibrations.size(ID) == 3
    with pytest.raises(ArtifactNotFound, match="prefixes"):
        blobs.open(ID)
    assert Path(calibrations.quarantine(ID)).read_bytes() == b"one"
    assert id_of_name(blob_name(ID, CALIBRATIONS)) is None


def test_quarantine_moves_the_blob_away(blobs: LocalBlobStore) -> None:
    put(blobs)
    place = blobs.quarantine(ID)
    assert Path(place).read_bytes() == b"blob"
    assert not blobs.exists(ID) and list(blobs.ids()) == []


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", "/etc/passwd", ID.upper(), ID + "0", ID[:-1] + "\n"]
)
def test_names_come_from_ids_only(blobs: LocalBlobStore, name: str) -> None:
    for action in (put_named, LocalBlobStore.open, LocalBlobStore.exists, LocalBlobStore.remove):
        with pytest.raises(ArtifactNotFound, match="not an artifact id"):
            action(blobs, name)
    assert files(blobs) == set()


def put_named(blobs: LocalBlobStore, name: str) -> None:
    put(blobs, artifact_id=name)


def test_other_files_in_the_folder_are_not_taken_for_blobs(blobs: LocalBlobStore) -> None:
    put(blobs)
    folder = blobs.root / "prefixes" / "ab"
    for name in ("x.safetensors", f"{OTHER}.safetensors", f"{ID}.safetensors.bak"):
        (folder / name).write_bytes(b"")
    assert list(blobs.ids()) == [ID]
    assert id_of_name(blob_name(ID)) == ID and id_of_name(f"x/{blob_name(ID)}") is None


def test_a_failing_writer_leaves_nothing_and_keeps_the_old_blob(blobs: LocalBlobStore) -> None:
    put(blobs)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError

    for artifact_id in (ID, OTHER):
        with pytest.raises(RuntimeError):
            blobs.put(artifact_id, fail)
    assert files(blobs) == {blob_name(ID)} and blobs.size(ID) == 4


def test_half_a_blob_is_never_seen(blobs: LocalBlobStore) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        assert not blobs.exists(ID) and list(blobs.ids()) == []
        assert blobs.remove_temporary() == (0, 0)  # the writer lives

    blobs.put(ID, write)
    assert blobs.exists(ID)


WRITER = """
import sys, time
from pathlib import Path
from xkv_artifacts.local_blobs import LocalBlobStore
def write(file):
    file.write(b"x" * 1000); file.flush(); print("writing", flush=True); time.sleep(600)
LocalBlobStore(Path(sys.argv[1])).put(sys.argv[2], write)
"""


def test_what_a_killed_writer_left_is_collected_and_what_a_living_one_writes_is_not(
    blobs: LocalBlobStore,
) -> None:
    command = [sys.executable, "-c", WRITER, str(blobs.root)]
    writers = [subprocess.Popen([*command, i], stdout=subprocess.PIPE) for i in (ID, OTHER)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    assert blobs.remove_temporary() == (0, 0)
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    assert blobs.remove_temporary() == (1, 1000)
    assert len(files(blobs)) == 1
    writers[1].kill()
    writers[1].wait()
    assert blobs.remove_temporary() == (1, 1000)
    assert files(blobs) == set()


def test_a_swept_away_file_is_made_again(blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    real, swept = fcntl.flock, []

    def sweep_once(file: BinaryIO, operation: int) -> None:
        if not swept:  # between the file's creation and its lock
            swept.append(blobs.root / "tmp")
            next((blobs.root / "tmp").iterdir()).unlink()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_once)
    put(blobs)
    assert swept and blobs.size(ID) == 4


LIMITED = """
import resource, sys
from pathlib import Path
from xkv_artifacts.errors import StoreError
from xkv_artifacts.local_blobs import LocalBlobStore
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    LocalBlobStore(Path(sys.argv[1])).put(sys.argv[2], lambda file: file.write(bytes(10 ** 6)))
except StoreError as error:
    print(error.message, "|", error.hint)
"""


def test_a_file_size_limit_is_one_clear_error_and_leaves_nothing(blobs: LocalBlobStore) -> None:
    command = [sys.executable, "-c", LIMITED, str(blobs.root), ID]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"cannot write artifact {ID} to {blobs.root}: File too large" in out and "ulimit" in out
    assert files(blobs) == set()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [999_000, 2_000_000])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(full_disk: Path, size: int) -> None:
    blobs = LocalBlobStore(full_disk / "store")
    put(blobs, b"small")
    (full_disk / "ballast").write_bytes(bytes(100_000))
    with pytest.raises(StoreError, match="no space left") as caught:
        put(blobs, bytes(size), OTHER)
    assert "free some space" in caught.value.hint and "\n" not in caught.value.message
    assert files(blobs) == {blob_name(ID)}
    (full_disk / "ballast").unlink()
    put(blobs, bytes(100_000), OTHER)
    assert blobs.size(OTHER) == 100_000


def test_dev_full_is_no_space(blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file system can be mounted, the kernel's own full device stands in."""
    real = Path.open

    def open_full(path: Path, mode: str = "r", *args: object, **named: object) -> object:
        return real(Path("/dev/full"), "wb") if mode == "xb" else real(path, mode)

    monkeypatch.setattr(Path, "open", open_full)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    with pytest.raises(StoreError, match="no space left"):
        put(blobs, bytes(100_000))
    monkeypatch.undo()
    assert files(blobs) == set()


AS_NOBODY = """
import os, sys
from pathlib import Path
from xkv_artifacts.errors import StoreError
from xkv_artifacts.local_blobs import LocalBlobStore
os.setgid(65534); os.setuid(65534)
blobs = LocalBlobStore(Path(sys.argv[1]), create=False)
assert blobs.open(sys.argv[2]).read() == b"blob" and len(blobs.store_id()) == 32
for action in (lambda: blobs.put("0" * 64, lambda file: file.write(b"x")), lambda: blobs.remove(sys.argv[2]),
               lambda: blobs.quarantine(sys.argv[2]), lambda: LocalBlobStore(Path(sys.argv[1]) / "new")):
    try:
        action()
    except StoreError as error:
        print(error.message, "|", error.hint)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_store_of_somebody_else_is_read_and_not_written() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        blobs = LocalBlobStore(Path(folder) / "store")
        put(blobs)
        out = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(blobs.root), ID], capture_output=True, text=True, check=True
        ).stdout
    lines = out.splitlines()
    assert len(lines) == 4
    assert all("Permission denied" in line and "who owns the store" in line for line in lines)


def test_a_store_has_one_id_for_all_who_open_it_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from xkv_artifacts.local_blobs import LocalBlobStore;"
        "print(LocalBlobStore(Path(sys.argv[1])).store_id())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    ids = {run.communicate(timeout=300)[0].strip() for run in runs}
    assert len(ids) == 1 and len(ids.pop()) == 32
    assert files(LocalBlobStore(tmp_path / "store")) == {"xkv-store.json"}


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"format": "xkv-store", "version": 1, "id": "x"}']
)
def test_a_damaged_store_description_is_told(blobs: LocalBlobStore, content: bytes) -> None:
    (blobs.root / "xkv-store.json").write_bytes(content)
    with pytest.raises(StoreError, match="not a store description"):
        blobs.store_id()


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_blob_store("rel/store").url == str(tmp_path / "rel" / "store")
    assert open_blob_store(f"file://{tmp_path}/a%20b").url == str(tmp_path / "a b")
    assert (tmp_path / "a b").is_dir()
    assert local_path("s3://bucket/x") is None
    assert local_path("~/x") == Path.home() / "x"
    for url in ("", "nosuch://x"):
        with pytest.raises(StoreError):
            open_blob_store(url)
    with pytest.raises(StoreError, match="there is no store"):
        open_blob_store("typo", create=False)
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make a store"):
        open_blob_store("file")
    with pytest.raises(StoreError, match="file is a file, not a folder") as caught:
        open_blob_store("file", create=False)
    assert caught.value.hint == "give the folder of a store"


def test_what_is_read_and_is_not_there_is_no_folder_to_be_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught, store_errors("read", "x"):
        (tmp_path / "x").read_bytes()
    assert caught.value.hint == "nothing is there; check the path, or the bucket's name"


def test_free_space_is_known(blobs: LocalBlobStore) -> None:
    free = blobs.free_bytes()
    assert free is not None and free > 0


def test_an_old_file_counts_as_left_behind_where_locks_do_not_work(
    blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def no_locks(file: BinaryIO, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (blobs.root / "tmp").mkdir()
    (blobs.root / "tmp" / "new").write_bytes(b"12")
    (blobs.root / "tmp" / "old").write_bytes(b"345")
    yesterday = time.time() - 25 * 3600
    os.utime(blobs.root / "tmp" / "old", (yesterday, yesterday))
    assert blobs.remove_temporary() == (1, 3)
    put(blobs)


def test_a_later_versions_store_is_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "xkv-store.json").write_text('{"format": "xkv-store", "version": 2, "id": "x", "more": 1}')
    with pytest.raises(StoreError, match="is of version 2, and this one reads 1") as refused:
        LocalBlobStore(tmp_path).store_id()
    assert "upgrade" in refused.value.hint and "delete" not in refused.value.hint
