"""`Breaker`: leaves a service alone for a while after it failed, so that not every request waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Closed while calls succeed. A failure opens it; after each pause one call may try again.

    Args:
        pause_s: between tries. clock: seconds.
    """

    def __init__(self, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s, self._clock = pause_s, clock
        self._retry_at: float | None = None

    def allows(self) -> bool:
        """Whether to call now; a caller that is told yes must say how it went."""
        if self._retry_at is None:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + self._pause_s  # the others go on waiting for this one
        return True

    def succeeded(self) -> None:
        """The call was answered."""
        self._retry_at = None

    def answered_late(self) -> None:
        """It was, after `failed`: it was slow rather than away. The next call may try at once, and only that:
        it may be slow every time."""
        if self._retry_at is not None:
            self._retry_at = self._clock()

    def failed(self) -> None:
        """It was not."""
        self._retry_at = self._clock() + self._pause_s
