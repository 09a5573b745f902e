"""A blob coded without loss by Zstandard, read as the file it was.

One frame that states its content's size, readable by any `zstd`. What it holds is not trusted: no more is
ever decoded than was stated, and no more may be stated than honest blobs take.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any, BinaryIO

from xkv_artifacts.errors import CorruptArtifact, StoreError

LEVEL = 3
MOST_EXPANSION = 8
"""Bytes decoded for each byte stored, at most, beyond `FREE_BYTES`: real blobs have 1.1 to 1.3."""
FREE_BYTES = 1 << 20
_PIECE = 1 << 20
_HEADER_BYTES = 18
_WINDOW_BYTES = 8 << 20


def compress(source: BinaryIO, target: BinaryIO, size: int) -> str:
    """Code all `size` bytes of `source`; their SHA-256.

    Raises:
        StoreError: the library is missing.
    """
    digest = hashlib.sha256()
    coder = _library().ZstdCompressor(level=LEVEL, write_checksum=True)
    with coder.stream_writer(target, size=size, closefd=False) as writer:
        while piece := source.read(_PIECE):
            digest.update(piece)
            writer.write(piece)
    return digest.hexdigest()


def may_state(size: int, stored: int) -> bool:
    """Whether a file of `stored` bytes may say that it holds `size`."""
    return size <= FREE_BYTES + MOST_EXPANSION * stored


class ZstdFile(io.RawIOBase):
    """The content of a coded file, at any offset; going back starts again from the beginning.

    Raises:
        CorruptArtifact: it is no such file, or states more than it may hold.
        StoreError: the library is missing.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._zstd, self._source = _library(), source
        stored = source.seek(0, os.SEEK_END)
        source.seek(0)
        self._size: int
        self._at = self._wanted = 0
        try:
            self._size = self._zstd.get_frame_parameters(source.read(_HEADER_BYTES)).content_size
        except self._zstd.ZstdError as error:
            raise CorruptArtifact(f"not a Zstandard file: {error}") from None
        if not may_state(self._size, stored):
            raise CorruptArtifact(f"{stored} bytes state a size of {self._size}")
        self._restart()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The offset that is read next."""
        return self._wanted

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Nothing is decoded before the next read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._wanted, os.SEEK_END: self._size}[whence]
        self._wanted = max(0, base + offset)
        return self._wanted

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, but for what lies behind the end."""
        if self._wanted < self._at:
            self._restart(self._wanted)
        while self._at < self._wanted and self._decoded(self._wanted - self._at):
            pass
        view, done = memoryview(buffer).cast("B"), 0
        while piece := self._decoded(min(len(view) - done, self._size - self._at)):
            view[done : done + len(piece)] = piece
            done += len(piece)
        self._wanted = max(self._wanted, self._at)
        return done

    def close(self) -> None:
        """Close the coded file too."""
        if not self.closed:
            self._source.close()
        super().close()

    def _decoded(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end."""
        if most <= 0:
            return b""
        try:
            piece: bytes = self._stream.read(min(most, _PIECE))
        except self._zstd.ZstdError as error:
            raise CorruptArtifact(f"damaged Zstandard file: {error}") from None
        self._at += len(piece)
        return piece

    def _restart(self, wanted: int = 0) -> None:
        self._source.seek(0)
        decoder = self._zstd.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        self._stream = decoder.stream_reader(self._source, read_size=_PIECE, closefd=False)
        self._at, self._wanted = 0, wanted


def sha256(file: BinaryIO) -> str:
    """Of all that is left to read."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _library() -> Any:
    try:
        import zstandard
    except ImportError:
        raise StoreError(
            "packed blobs need the package zstandard", hint='pip install "xkv-service[zstd]"'
        ) from None
    return zstandard
