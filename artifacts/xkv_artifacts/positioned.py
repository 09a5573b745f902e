"""A file that is read at any offset, by several threads at once."""

from __future__ import annotations

import io
import os
import threading
from typing import Any, BinaryIO


class PositionedFile:
    """Reads of an open file that do not depend on its position.

    A local file is read by the system, at once by as many threads as ask; of any other one thread reads at a
    time.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self._descriptor = _descriptor(file)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with bytes from `offset` on; how many there were, 0 at the end of the file."""
        if self._descriptor is not None:
            return os.preadv(self._descriptor, [view], offset)
        file: Any = self._file
        with self._lock:
            file.seek(offset)
            return file.readinto(view) or 0


def _descriptor(file: BinaryIO) -> int | None:
    local = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    return file.fileno() if local else None
