"""Where blobs live: a folder, or an object store by URL. Names come from ids and nothing else."""

from __future__ import annotations

import errno
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from xkv_artifacts.errors import ArtifactNotFound, StoreError
from xkv_artifacts.keys import is_artifact_id

if TYPE_CHECKING:
    from xkv_artifacts.packable_blobs import PackableBlobs

Result = TypeVar("Result")

SUFFIX = ".safetensors"
PACKED_SUFFIX = ".safetensors.zst"
PREFIXES = "prefixes"
CALIBRATIONS = "calibrations"
CALIBRATING = "calibrating"
TAILS = "tails"
TAIL_SUFFIX = ".xkv"
QUARANTINE = "quarantine"
STORE_FILE = "xkv-store.json"
_STORE_FORMAT = {"format": "xkv-store", "version": 1}


class BlobStore(ABC):
    """Blobs of one folder of the store by artifact id. A blob under its own name is complete: it appears in
    one step or not at all.
    """

    url: str
    folder: str = PREFIXES
    suffix: str = SUFFIX

    def of(self, folder: str, suffix: str = SUFFIX) -> BlobStore:
        """The blobs of another folder of this store, whose names end in `suffix`."""
        other = copy(self)
        other.folder, other.suffix = folder, suffix
        return other

    @abstractmethod
    def put(self, artifact_id: str, write: Callable[[BinaryIO], Result]) -> Result:
        """Let `write` fill a new blob, then publish it in one step; nothing stays behind when it fails.

        Raises:
            StoreError: no space, no permission, no connection.
        """

    @abstractmethod
    def open(self, artifact_id: str) -> BinaryIO:
        """Open a blob for reading at any offset.

        Raises:
            ArtifactNotFound, StoreError
        """

    @abstractmethod
    def exists(self, artifact_id: str) -> bool:
        """Whether the blob is there."""

    @abstractmethod
    def size(self, artifact_id: str) -> int:
        """Bytes of the blob.

        Raises:
            ArtifactNotFound, StoreError
        """

    @abstractmethod
    def age(self, artifact_id: str) -> float:
        """Seconds since the blob was written.

        Raises:
            ArtifactNotFound, StoreError
        """

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """The ids of all blobs, in order."""

    @abstractmethod
    def sizes(self) -> Iterator[int]:
        """Bytes of each blob, in any order: what the folder takes, whatever a catalog says of it."""

    @abstractmethod
    def remove(self, artifact_id: str, *, durably: bool = True) -> bool:
        """Delete a blob; False when there was none.

        Args:
            durably: it stays deleted through a power cut. Waiting for the disk takes most of the time.
        """

    @abstractmethod
    def quarantine(self, artifact_id: str) -> str:
        """Move a bad blob out of the way and say where it is now.

        Raises:
            ArtifactNotFound, StoreError
        """

    @abstractmethod
    def remove_temporary(self) -> tuple[int, int]:
        """Delete what dead writers left behind.

        Returns:
            (files, bytes) deleted.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes free for new blobs, None where there is no such number."""

    @abstractmethod
    def root_file(self, name: str) -> bytes | None:
        """A small file at the store's root, or None when it is not there."""

    @abstractmethod
    def store_id(self) -> str:
        """32 hex digits that name this store in a catalog shared by several stores."""


def open_blob_store(url: str, *, create: bool = True) -> PackableBlobs:
    """The blob store at a folder path, a file:// URL, or any URL that fsspec knows (s3://bucket/path).

    Args:
        url: where the store is.
        create: make the store when there is none yet; else a store must be there.

    Raises:
        StoreError: the URL is of an unknown kind, or the store cannot be reached.
    """
    from xkv_artifacts.local_blobs import LocalBlobStore
    from xkv_artifacts.object_blobs import ObjectBlobStore
    from xkv_artifacts.packable_blobs import PackableBlobs

    path = local_path(url)
    if path is not None:
        return PackableBlobs(LocalBlobStore(path, create=create))
    return PackableBlobs(ObjectBlobStore(url, create=create))


def local_path(url: str) -> Path | None:
    """The folder that a store's URL names, or None when it is not on this machine's file system.

    Raises:
        StoreError: the URL is empty.
    """
    if not url:
        raise StoreError("the store's URL is empty", hint="give a folder or a URL such as s3://bucket/path")
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(unquote(parts.path)).absolute()
    return None


def blob_name(artifact_id: str, folder: str = PREFIXES, suffix: str = SUFFIX) -> str:
    """A blob's place in the store, relative to its root.

    Raises:
        ArtifactNotFound: not an artifact id, so there can be no such blob.
    """
    if not is_artifact_id(artifact_id):
        raise ArtifactNotFound(f"{artifact_id[:80]!r} is not an artifact id", hint="ids are 64 hex digits")
    return f"{folder}/{artifact_id[:2]}/{artifact_id}{suffix}"


def id_of_name(name: str, folder: str = PREFIXES, suffix: str = SUFFIX) -> str | None:
    """The artifact id of a blob's place, or None when no blob of ours is called that."""
    artifact_id = name.rsplit("/", 1)[-1].removesuffix(suffix)
    known = is_artifact_id(artifact_id) and name == blob_name(artifact_id, folder, suffix)
    return artifact_id if known else None


def not_found(artifact_id: str, blobs: BlobStore) -> ArtifactNotFound:
    """The error for a blob that is not in the store."""
    return ArtifactNotFound(f"artifact {artifact_id} is not in {blobs.url}/{blobs.folder}")


def new_store_file() -> bytes:
    """The content of a new store's `xkv-store.json`."""
    return json.dumps({**_STORE_FORMAT, "id": uuid.uuid4().hex}).encode("ascii") + b"\n"


def parse_store_file(content: bytes, where: str) -> str:
    """The store's id.

    Raises:
        StoreError: the file is damaged or of a later version.
    """
    try:
        fields = json.loads(content)
        _refuse_later(fields, where)
        store_id = str(fields.pop("id"))
        known = fields == _STORE_FORMAT and uuid.UUID(hex=store_id).hex == store_id
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise StoreError(
            f"{where} is not a store description that this version reads", hint=f"delete {where}"
        )
    return store_id


def _refuse_later(fields: dict[str, Any], where: str) -> None:
    """Deleting what a later version wrote would give its store another id."""
    if fields.get("format") == _STORE_FORMAT["format"] and fields.get("version") != _STORE_FORMAT["version"]:
        raise StoreError(
            f"{where} is of version {fields.get('version')!r}, and this one reads {_STORE_FORMAT['version']}",
            hint="upgrade xkv-service, or use another store",
        )


@contextmanager
def store_errors(doing: str, url: str) -> Iterator[None]:
    """Turn what the file system or object store raises into one clear line.

    Raises:
        StoreError
    """
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {doing} {url}: {_reason(error)}", hint=_hint(error, doing)) from error


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left"
    if error.errno == errno.EEXIST:
        return "it is a file"
    return str(error.strerror or error or type(error).__name__).splitlines()[0][:300]


def _hint(error: OSError, doing: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or use another store, then run it again"
    if error.errno == errno.EFBIG:
        return "raise the file size limit (ulimit -f)"
    if error.errno == errno.EROFS:
        return "the file system is read-only; use another store"
    if isinstance(error, PermissionError):
        return "check who owns the store, its permissions or credentials"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "a file is in the way; give a folder"
    if error.errno == errno.ENOENT and doing.startswith("read"):
        return "nothing is there; check the path, or the bucket's name"
    if error.errno == errno.ENOENT:
        return "no folder can be made there; check the path, or the bucket's name"
    return "check the store's place, or use another store"
