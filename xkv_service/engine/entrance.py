"""`Entrance`: lets requests into an engine until it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

from xkv_service.engine.messages import Failed

STOPPING = Failed("overloaded", "the server is stopping", retry_after_s=5.0)
DIED = Failed("overloaded", "the engine that answered died", retry_after_s=5.0)


class Entrance:
    """For any thread: nobody comes in behind the last look at what has come."""

    def __init__(self) -> None:
        self._refusal: Failed | None = None
        self._lock = threading.Lock()

    def enter(self, submit: Callable[[], None]) -> Failed | None:
        """Let a request in: `submit` is called before `close` returns; or why it may not enter."""
        with self._lock:
            if self._refusal is not None:
                return self._refusal
            submit()
        return None

    def close(self, refusal: Failed) -> None:
        """Let nobody in any more; who comes is told this."""
        with self._lock:
            self._refusal = refusal
