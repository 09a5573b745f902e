"""Memory that a process freed, given back to the system."""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress

EVERY_S = 10.0


def give_back_free_memory() -> None:
    """Have the C library return the pages that it keeps for later; nothing where it is not glibc.

    Sequences allocate and free tensors of all sizes, a long prompt's beside a short one's. glibc keeps the
    gaps between them, in an arena for each thread, and a process grows although it holds no more.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class FreeMemory:
    """Gives back free memory every 10 s, on a thread of its own, until it is closed."""

    def __init__(self) -> None:
        self._ending = threading.Event()
        threading.Thread(target=self._run, name="free-memory", daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._ending.set()

    def _run(self) -> None:
        while not self._ending.wait(EVERY_S):
            give_back_free_memory()
