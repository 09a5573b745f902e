"""`Alarm`: one thread that calls functions when their time has come."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Alarm:
    """Calls functions at their time, in order; each must be quick, since the others wait for it."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def after(self, seconds: float, call: Callable[[], None]) -> bool:
        """Call `call` in `seconds`, or never where the alarm closes before; False: it is closed already."""
        with self._changed:
            if self._closed:
                return False
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), call))
            self._changed.notify()
            return True

    def close(self) -> None:
        """Stop, and wait for a call that is running, unless it is the caller."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:  # noqa: BLE001 - a caller's fault must not stop the others' alarms
                _log.exception("a call at its time failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while True:
                wait = self._due[0][0] - time.monotonic() if self._due else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._due)[2]
                if self._closed:
                    return None
                self._changed.wait(wait)
