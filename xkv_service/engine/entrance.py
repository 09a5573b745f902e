"""`Entrance`: lets requests into an engine until it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

from xkv_service.engine.messages import Failed

STOPPING = Failed("overloaded", "the server is stopping", retry_after_s=5.0)


class Entrance:
    """For any thread: nobody comes in behind the last look at what has come."""

    def __init__(self) -> None:
        self._closed = False
        self._lock = threading.Lock()

    def enter(self, submit: Callable[[], None]) -> Failed | None:
        """Let a request in: `submit` is called before `close` returns; or why it may not enter."""
        with self._lock:
            if self._closed:
                return STOPPING
            submit()
        return None

    def close(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._closed = True
