"""A file that is read at any offset, by several threads at once."""

from __future__ import annotations

import io
import os
import threading
from typing import Any, BinaryIO

from xkv_artifacts.errors import CorruptArtifact


class PositionedFile:
    """Reads of an open file that do not depend on its position.

    A local file is read by the system, at once by as many threads as ask; of any other one thread reads at a
    time.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self._descriptor = _descriptor(file)

    def fill(self, view: memoryview, offset: int, name: str) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            CorruptArtifact: the file ends before; `name` is the tensor that is read.
        """
        done = 0
        while done < len(view):
            count = self._read_into(view[done:], offset + done)
            if not count:
                raise CorruptArtifact(f"tensor {name}: the file was truncated while it was read")
            done += count

    def _read_into(self, view: memoryview, offset: int) -> int:
        if self._descriptor is not None:
            return os.preadv(self._descriptor, [view], offset)
        file: Any = self._file
        with self._lock:
            file.seek(offset)
            return file.readinto(view) or 0


def _descriptor(file: BinaryIO) -> int | None:
    local = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    return file.fileno() if local else None
