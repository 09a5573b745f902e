"""Whether a file is read from memory or from the disk: drop its pages, count them, count bytes read."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop(path: Path) -> None:
    """Ask the kernel to forget a file's pages; it needs no rights. What the disk below keeps is not known."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> int:
    """Pages of a file that are in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        count = -(-len(mapped) // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * count)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        library = ctypes.CDLL(None, use_errno=True)
        if library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), flags):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(flag & 1 for flag in flags)


def dropped_share(path: Path) -> float:
    """Share of a file's pages that leave memory when they are dropped."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    before = cached_pages(path)
    drop(path)
    return 1 - cached_pages(path) / max(1, before)


def bytes_read() -> int:
    """Bytes that this process has had read from disks so far; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)
