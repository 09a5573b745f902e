"""Checked reads of prefix artifacts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

from xkv_artifacts import format as blob_format
from xkv_artifacts.blobs import BlobStore
from xkv_artifacts.checked_blobs import CheckedBlobs, of_id
from xkv_artifacts.errors import CorruptArtifact, StoreError
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.missing_blobs import MissingBlobs
from xkv_artifacts.read_ahead import Landing
from xkv_artifacts.zstd_file import ZstdFile

if TYPE_CHECKING:
    import torch


class CheckedPrefixes:
    """What `CheckedBlobs` gives of prefixes. Every method but `fault` raises as its `read`.

    Args:
        on_damage: told of each blob whose header or token ids `read_tokens` found bad, with its manifest
            where the header was whole.
        missing: tells blobs that are lost from others that are not there; None: nobody does.
    """

    def __init__(
        self,
        blobs: BlobStore,
        forget: Callable[[str], None],
        on_damage: Callable[[str, PrefixManifest | None], None],
        missing: MissingBlobs | None = None,
    ) -> None:
        self._checked = CheckedBlobs(blobs, forget, missing=missing)
        self._on_damage = on_damage

    def read_prefix(
        self, artifact_id: str, names: Iterable[str] | None
    ) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
        """The manifest and the tensors, all or only `names`. Raises MissingTensor too."""

        def read(file: BinaryIO) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
            manifest, tensors = blob_format.read_prefix(file, names)
            return of_id(artifact_id, manifest), tensors

        return self._checked.read(artifact_id, read)

    def read_parts(
        self, artifact_id: str, parts: Iterable[Iterable[str]], landing: Landing | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> Generator[dict[str, torch.Tensor], None, None]:  # fmt: skip
        """The tensors of each part, as `format.read_parts`. Raises MissingTensor too.

        Args:
            digests: of all tensors, as a header that was read before has them; another file is a StoreError.
        """
        with self._checked.opened(artifact_id) as file:
            # Parts do not follow the order of the file, and going back in a packed one decodes it again.
            source = BytesIO(file.read()) if isinstance(file, ZstdFile) else file
            manifest, found = blob_format.read_parts(source, parts, landing)
            of_id(artifact_id, manifest)
            if digests is not None and manifest.tensors != digests:
                raise StoreError(
                    f"artifact {artifact_id[:12]} was made again while it was read", hint="load it again"
                )
            yield from found

    def read_in_ranges(self, artifact_id: str) -> bool:
        """Whether `read_parts` reads what is asked for alone: a packed blob is decoded whole."""
        return self._checked.read(artifact_id, lambda file: not isinstance(file, ZstdFile))

    def read_manifest(self, artifact_id: str) -> PrefixManifest:
        """The manifest alone."""
        return self._checked.read(
            artifact_id, lambda file: of_id(artifact_id, blob_format.read_manifest(file))
        )

    def read_tokens(self, artifact_id: str) -> tuple[PrefixManifest, bytes]:
        """The manifest and the token ids as little-endian int32 bytes."""

        seen: list[PrefixManifest] = []

        def read(file: BinaryIO) -> tuple[PrefixManifest, bytes]:
            manifest, tokens = blob_format.read_tokens(file, seen.append)
            return of_id(artifact_id, manifest), tokens

        try:
            return self._checked.read(artifact_id, read)
        except CorruptArtifact:
            whole = next((manifest for manifest in seen if manifest.id == artifact_id), None)
            self._on_damage(artifact_id, whole)
            raise

    def fault(self, artifact_id: str) -> str | None:
        """Read every byte; what is wrong, or None. Nothing is moved. Raises StoreError."""
        return self._checked.fault(artifact_id, blob_format.verify)
