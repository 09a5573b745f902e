"""Blobs in a folder: written to `tmp/`, synced, renamed into place."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from xkv_artifacts.atomic_file import sync_folder
from xkv_artifacts.blobs import (
    PREFIXES,
    QUARANTINE,
    STORE_FILE,
    BlobStore,
    Result,
    blob_name,
    id_of_name,
    new_store_file,
    not_found,
    parse_store_file,
    store_errors,
)
from xkv_artifacts.errors import StoreError

TEMPORARY = "tmp"
# Where a file system knows no locks, only age can tell that a temporary file's writer is gone.
_UNLOCKABLE_SECONDS = 24 * 3600.0


class LocalBlobStore(BlobStore):
    """A store in a folder. `url` is its absolute path."""

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        self.url = str(root)
        if not create and root.exists() and not root.is_dir():
            raise StoreError(f"{root} is a file, not a folder", hint="give the folder of a store")
        if not create and not (root / STORE_FILE).is_file() and not (root / PREFIXES).is_dir():
            raise StoreError(f"there is no store at {root}", hint="xkv precompute makes one")
        if create:
            with store_errors("make a store at", self.url):
                root.mkdir(parents=True, exist_ok=True)

    def put(self, artifact_id: str, write: Callable[[BinaryIO], Result]) -> Result:
        target = self._blob(artifact_id)
        with store_errors(f"write artifact {artifact_id} to", self.url):
            temporary, file = self._open_temporary(artifact_id)
            try:
                with file:
                    result = write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    _make_folder(target.parent)
                    temporary.rename(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(target.parent)
        return result

    def open(self, artifact_id: str) -> BinaryIO:
        with store_errors(f"read artifact {artifact_id} in", self.url):
            try:
                return self._blob(artifact_id).open("rb")
            except (FileNotFoundError, NotADirectoryError):
                raise not_found(artifact_id, self) from None

    def exists(self, artifact_id: str) -> bool:
        with store_errors("look into", self.url):
            return self._blob(artifact_id).is_file()

    def size(self, artifact_id: str) -> int:
        with store_errors(f"read artifact {artifact_id} in", self.url):
            try:
                return self._blob(artifact_id).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise not_found(artifact_id, self) from None

    def age(self, artifact_id: str) -> float:
        with store_errors(f"read artifact {artifact_id} in", self.url):
            try:
                return time.time() - self._blob(artifact_id).stat().st_mtime
            except (FileNotFoundError, NotADirectoryError):
                raise not_found(artifact_id, self) from None

    def ids(self) -> Iterator[str]:
        with store_errors("list", self.url):
            found = sorted((self.root / self.folder).glob(f"??/*{self.suffix}"))
        for path in found:
            artifact_id = id_of_name(path.relative_to(self.root).as_posix(), self.folder, self.suffix)
            if artifact_id is not None:
                yield artifact_id

    def sizes(self) -> Iterator[int]:
        with store_errors("list", self.url):
            for part in (self.root / self.folder).glob("??"):
                with suppress(FileNotFoundError, NotADirectoryError), os.scandir(part) as found:
                    yield from (size for entry in found if (size := self._size(entry)) is not None)

    def remove(self, artifact_id: str, *, durably: bool = True) -> bool:
        path = self._blob(artifact_id)
        with store_errors(f"remove artifact {artifact_id} from", self.url):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return False
            if durably:
                sync_folder(path.parent)
        return True

    def quarantine(self, artifact_id: str) -> str:
        target = self.root / QUARANTINE / f"{artifact_id}{self.suffix}"
        with store_errors(f"quarantine artifact {artifact_id} in", self.url):
            _make_folder(target.parent)
            try:
                self._blob(artifact_id).rename(target)
            except FileNotFoundError:
                raise not_found(artifact_id, self) from None
            sync_folder(target.parent)
        return str(target)

    def remove_temporary(self) -> tuple[int, int]:
        files = size = 0
        with store_errors("clean up", self.url):
            for path in (self.root / TEMPORARY).glob("*"):
                removed = _remove_if_dead(path)
                files += removed is not None
                size += removed or 0
        return files, size

    def free_bytes(self) -> int | None:
        with store_errors("look into", self.url):
            return shutil.disk_usage(self.root).free

    def root_file(self, name: str) -> bytes | None:
        path = self.root / name
        with store_errors("read", str(path)):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def store_id(self) -> str:
        path = self.root / STORE_FILE
        with store_errors("read", str(path)):
            try:
                return parse_store_file(path.read_bytes(), str(path))
            except FileNotFoundError:
                pass
        if not os.access(self.root, os.W_OK):
            # A read-only folder of blobs without a description can still be read, under its path's name.
            return hashlib.sha256(os.fsencode(self.root.resolve())).hexdigest()[:32]
        self._write_store_file(path)
        return parse_store_file(path.read_bytes(), str(path))

    def _blob(self, artifact_id: str) -> Path:
        return self.root / blob_name(artifact_id, self.folder, self.suffix)

    def _size(self, entry: os.DirEntry[str]) -> int | None:
        if not entry.name.endswith(self.suffix):
            return None
        with suppress(FileNotFoundError):  # removed since the folder was read
            return entry.stat().st_size
        return None

    def _write_store_file(self, path: Path) -> None:
        with store_errors("write", str(path)):
            temporary, file = self._open_temporary("store")
            try:
                with file:
                    file.write(new_store_file())
                    file.flush()
                    os.fsync(file.fileno())
                # A link, unlike a rename, fails when another process was first: all agree on one id.
                with suppress(FileExistsError):
                    path.hardlink_to(temporary)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(self.root)

    def _open_temporary(self, stem: str) -> tuple[Path, BinaryIO]:
        """A new file in `tmp/`, locked while its writer lives: a free lock marks it as left behind."""
        folder = self.root / TEMPORARY
        _make_folder(folder)
        while True:
            path = folder / f"{stem}.{uuid.uuid4().hex[:12]}"
            file = path.open("xb")
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                return path, file
            file.close()  # swept away between its creation and its lock


def _remove_if_dead(path: Path) -> int | None:
    """Delete a temporary file whose writer is gone; its bytes, or None when it stays."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError:
                if time.time() - status.st_mtime < _UNLOCKABLE_SECONDS:
                    return None
            path.unlink()
            return status.st_size
    except FileNotFoundError:
        return None


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
