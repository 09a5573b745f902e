"""Blobs of which some are packed: coded without loss for cold storage, read like the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from heapq import merge
from typing import BinaryIO, cast

from xkv_artifacts.blobs import PACKED_SUFFIX, SUFFIX, BlobStore, Result, store_errors
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.zstd_file import ZstdFile, compress, may_state, sha256


class PackableBlobs(BlobStore):
    """A store whose blobs lie under either of two names: as they are, or packed. New ones are as they are.

    Where both are there (a process died while it packed) the plain one counts.
    """

    def __init__(self, plain: BlobStore) -> None:
        self.plain, self.packed = plain, plain.of(plain.folder, PACKED_SUFFIX)
        self.url, self.folder = plain.url, plain.folder

    def of(self, folder: str, suffix: str = SUFFIX) -> BlobStore:
        """Blobs of other formats are never packed."""
        other = self.plain.of(folder, suffix)
        return PackableBlobs(other) if suffix == SUFFIX else other

    def put(self, artifact_id: str, write: Callable[[BinaryIO], Result]) -> Result:
        result = self.plain.put(artifact_id, write)
        self.packed.remove(artifact_id)
        return result

    def open(self, artifact_id: str) -> BinaryIO:
        try:
            return self.plain.open(artifact_id)
        except ArtifactNotFound as missing:
            if not self.packed.exists(artifact_id):
                raise missing from None
        source = self.packed.open(artifact_id)
        try:
            return cast("BinaryIO", ZstdFile(source))
        except BaseException:
            source.close()
            raise

    def exists(self, artifact_id: str) -> bool:
        return self.plain.exists(artifact_id) or self.packed.exists(artifact_id)

    def size(self, artifact_id: str) -> int:
        return self._holder(artifact_id).size(artifact_id)

    def age(self, artifact_id: str) -> float:
        return self._holder(artifact_id).age(artifact_id)

    def ids(self) -> Iterator[str]:
        last = ""
        for artifact_id in merge(self.plain.ids(), self.packed.ids()):
            if artifact_id != last:
                yield artifact_id
            last = artifact_id

    def sizes(self) -> Iterator[int]:
        yield from self.plain.sizes()
        yield from self.packed.sizes()

    def remove(self, artifact_id: str, *, durably: bool = True) -> bool:
        packed = self.packed.remove(artifact_id, durably=durably)
        return self.plain.remove(artifact_id, durably=durably) or packed

    def quarantine(self, artifact_id: str) -> str:
        return self._holder(artifact_id).quarantine(artifact_id)

    def remove_temporary(self) -> tuple[int, int]:
        return self.plain.remove_temporary()

    def free_bytes(self) -> int | None:
        return self.plain.free_bytes()

    def root_file(self, name: str) -> bytes | None:
        return self.plain.root_file(name)

    def store_id(self) -> str:
        return self.plain.store_id()

    def pack(self, artifact_id: str) -> bool:
        """Replace a plain blob by a packed one that was read back; False where there is none, or no gain.

        Raises:
            StoreError: no space, no connection, or the library is missing; the plain blob is still there.
        """
        try:
            size = self.plain.size(artifact_id)
        except ArtifactNotFound:
            return False
        with self.plain.open(artifact_id) as source, store_errors("read", self.url):
            digest = self.packed.put(artifact_id, lambda target: compress(source, target, size))
        stored = self.packed.size(artifact_id)
        if stored >= size or not may_state(size, stored):
            self.packed.remove(artifact_id)
            return False
        self._check(artifact_id, digest)
        if self.plain.remove(artifact_id):
            return True
        self.packed.remove(artifact_id)  # it was deleted meanwhile, and stays deleted
        return False

    def unpack(self, artifact_id: str) -> bool:
        """Replace a packed blob by a plain one; False where there is none.

        Raises:
            CorruptArtifact: it is damaged. StoreError: no space, no connection, or the library is missing.
        """
        if not self.packed.exists(artifact_id):
            return False
        if not self.plain.exists(artifact_id):
            with self.open(artifact_id) as source:
                self.plain.put(artifact_id, lambda target: _copy(source, target))
        return self.packed.remove(artifact_id)

    def _check(self, artifact_id: str, digest: str) -> None:
        with closing(ZstdFile(self.packed.open(artifact_id))) as file:
            if sha256(cast("BinaryIO", file)) == digest:
                return
        self.packed.remove(artifact_id)
        raise CorruptArtifact(f"artifact {artifact_id}: what was packed does not read back")

    def _holder(self, artifact_id: str) -> BlobStore:
        both = self.plain, self.packed
        return next((one for one in both if one.exists(artifact_id)), self.plain)


def _copy(source: BinaryIO, target: BinaryIO) -> None:
    while piece := source.read(1 << 20):
        target.write(piece)
