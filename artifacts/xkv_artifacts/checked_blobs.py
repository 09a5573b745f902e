"""Checked reads: a blob that fails goes to quarantine and is forgotten, and the caller gets no byte of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from xkv_artifacts import format as blob_format
from xkv_artifacts.blobs import BlobStore, store_errors
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, StoreError, UnsupportedFormat
from xkv_artifacts.manifest import PrefixManifest

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


class CheckedBlobs:
    """Checked reads from a blob store.

    Args:
        blobs: the store.
        forget: told the id of each blob that was bad.

    Every method but `fault` raises ArtifactNotFound, CorruptArtifact (the blob is in quarantine then),
    UnsupportedFormat or StoreError.
    """

    def __init__(self, blobs: BlobStore, forget: Callable[[str], None]) -> None:
        self._blobs = blobs
        self._forget = forget

    def read_prefix(
        self, artifact_id: str, names: Iterable[str] | None
    ) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
        """The manifest and the tensors, all or only `names`. Raises MissingTensor too."""

        def read(file: BinaryIO) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
            manifest, tensors = blob_format.read_prefix(file, names)
            return _of(artifact_id, manifest), tensors

        return self._read(artifact_id, read)

    def read_manifest(self, artifact_id: str) -> PrefixManifest:
        """The manifest alone."""
        return self._read(artifact_id, lambda file: _of(artifact_id, blob_format.read_manifest(file)))

    def read_tokens(self, artifact_id: str) -> tuple[PrefixManifest, bytes]:
        """The manifest and the token ids as little-endian int32 bytes."""

        def read(file: BinaryIO) -> tuple[PrefixManifest, bytes]:
            manifest, tokens = blob_format.read_tokens(file)
            return _of(artifact_id, manifest), tokens

        return self._read(artifact_id, read)

    def fault(self, artifact_id: str) -> str | None:
        """Read every byte; what is wrong, or None. Nothing is moved.

        Raises:
            StoreError
        """
        try:
            with self._blobs.open(artifact_id) as file, store_errors("read", self._blobs.url):
                _of(artifact_id, blob_format.verify(file))
        except (CorruptArtifact, UnsupportedFormat, ArtifactNotFound) as error:
            return error.message
        return None

    def _read(self, artifact_id: str, read: Callable[[BinaryIO], Result]) -> Result:
        try:
            with self._blobs.open(artifact_id) as file, store_errors("read", self._blobs.url):
                return read(file)
        except CorruptArtifact as error:
            raise self._quarantined(artifact_id, error.message) from None
        except UnsupportedFormat as error:
            raise UnsupportedFormat(f"artifact {artifact_id}: {error.message}", hint=error.hint) from None

    def _quarantined(self, artifact_id: str, reason: str) -> CorruptArtifact:
        place = "it could not be moved away"
        with suppress(StoreError, ArtifactNotFound):
            place = f"moved to {self._blobs.quarantine(artifact_id)}"
        self._forget(artifact_id)
        return CorruptArtifact(f"artifact {artifact_id}: {reason} ({place})", hint="compute it again")


def _of(artifact_id: str, manifest: PrefixManifest) -> PrefixManifest:
    if manifest.id != artifact_id:
        raise CorruptArtifact(f"the blob is artifact {manifest.id}")
    return manifest
