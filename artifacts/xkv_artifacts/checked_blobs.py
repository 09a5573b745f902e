"""Checked reads: a blob that fails is put away and forgotten, and the caller gets no byte of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Protocol, TypeVar

from xkv_artifacts.blobs import BlobStore, not_found, store_errors
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CorruptArtifact,
    MissingBlob,
    StoreError,
    UnsupportedFormat,
)
from xkv_artifacts.missing_blobs import MissingBlobs


class Identified(Protocol):
    """A manifest of any format."""

    @property
    def id(self) -> str:
        """64 hex digits."""


Manifest = TypeVar("Manifest", bound=Identified)
Result = TypeVar("Result")


class CheckedBlobs:
    """Checked reads from a blob store.

    Args:
        blobs: the store.
        forget: told the id of each blob that was bad.
        noun, hint: what its blobs are called, and what to do when one is bad.
        delete: bad blobs are deleted; else they go to quarantine.
        missing: tells blobs that are lost from others that are not there; None: nobody does.
    """

    def __init__(
        self,
        blobs: BlobStore,
        forget: Callable[[str], None],
        *,
        noun: str = "artifact",
        hint: str = "compute it again",
        delete: bool = False,
        missing: MissingBlobs | None = None,
    ) -> None:
        self._blobs = blobs
        self._forget = forget
        self._noun = noun
        self._hint = hint
        self._delete = delete
        self._missing = missing

    def read(self, artifact_id: str, read: Callable[[BinaryIO], Result]) -> Result:
        """What `read` makes of the blob. Raises as `opened`."""
        with self.opened(artifact_id) as file:
            return read(file)

    @contextmanager
    def opened(self, artifact_id: str) -> Iterator[BinaryIO]:
        """The blob's file. A fault that is found while the block runs puts it away.

        Raises:
            ArtifactNotFound, UnsupportedFormat, StoreError
            MissingBlob: it is lost; see `MissingBlobs.note`.
            CorruptArtifact: a fault was found; the blob is in quarantine, or deleted.
        """
        try:
            with self._blobs.open(artifact_id) as file, store_errors("read", self._blobs.url):
                try:
                    yield file
                except FileNotFoundError:  # an object store's blob that was deleted while it is read
                    raise not_found(artifact_id, self._blobs) from None
        except ArtifactNotFound:
            if self._missing is not None and self._missing.note(artifact_id):
                raise MissingBlob(self._missing.message(artifact_id), hint=self._hint) from None
            raise
        except CorruptArtifact as error:
            raise self._put_away(artifact_id, error.message) from None
        except UnsupportedFormat as error:
            message = f"{self._noun} {artifact_id}: {error.message}"
            raise UnsupportedFormat(message, hint=error.hint) from None

    def fault(self, artifact_id: str, verify: Callable[[BinaryIO], Identified]) -> str | None:
        """Let `verify` read every byte; what is wrong, or None. Nothing is moved.

        Raises:
            StoreError
        """
        try:
            with self._blobs.open(artifact_id) as file, store_errors("read", self._blobs.url):
                of_id(artifact_id, verify(file))
        except (CorruptArtifact, UnsupportedFormat, ArtifactNotFound) as error:
            return error.message
        return None

    def _put_away(self, artifact_id: str, reason: str) -> CorruptArtifact:
        place = "it could not be moved away"
        with suppress(StoreError, ArtifactNotFound):
            if self._delete:
                self._blobs.remove(artifact_id)
                place = "deleted"
            else:
                place = f"moved to {self._blobs.quarantine(artifact_id)}"
        self._forget(artifact_id)
        return CorruptArtifact(f"{self._noun} {artifact_id}: {reason} ({place})", hint=self._hint)


def of_id(artifact_id: str, manifest: Manifest) -> Manifest:
    """The manifest, if it is that of the id that the blob is stored under.

    Raises:
        CorruptArtifact
    """
    if manifest.id != artifact_id:
        raise CorruptArtifact(f"the blob is artifact {manifest.id}")
    return manifest
