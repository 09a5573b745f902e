"""`OpenRequests`: how many requests an engine has, and whether it takes more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from xkv_service.engine.messages import Failed

STOPPING = Failed("overloaded", "the server is stopping", retry_after_s=5.0)


class OpenRequests:
    """Counts requests from their submission to their end; for any thread.

    Args:
        most: at once.
    """

    def __init__(self, most: int) -> None:
        self._most, self._open, self._closed = most, 0, False
        self._lock = threading.Lock()

    def enter(self, submit: Callable[[], None]) -> Failed | None:
        """Let a request in: `submit` is called before `close` returns; or why it may not enter."""
        with self._lock:
            if self._closed:
                return STOPPING
            if self._open >= self._most:
                return Failed(
                    "overloaded", f"{self._most} requests are being served or wait", retry_after_s=1.0
                )
            self._open += 1
            submit()
        return None

    def leave(self) -> None:
        """A request has ended."""
        with self._lock:
            self._open -= 1

    def close(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._closed = True
