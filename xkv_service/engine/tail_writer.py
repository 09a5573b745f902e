"""`TailWriter`: one thread that stores what leaves memory, and never keeps the engine waiting."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from xkv_artifacts.session_format import SessionManifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LeavingTail:
    """A tail on its way out.

    Args:
        manifest, tensors: as of a session file; the tensors may be views on any device, which nobody changes.
        namespace: whose conversation it is. nbytes: that the tensors keep from being freed.
    """

    manifest: SessionManifest
    namespace: str
    nbytes: int
    tensors: dict[str, torch.Tensor] = field(repr=False)


class TailWriter:
    """A bounded queue and the thread that empties it.

    Args:
        write: stores one tail; it must not raise.
        room: bytes of tails that wait or are being written. One that is larger is taken while none waits.
    """

    def __init__(self, write: Callable[[LeavingTail], None], room: int) -> None:
        self._write, self._room = write, room
        self._changed = threading.Condition()
        self._waiting: deque[LeavingTail] = deque()
        self._bytes = 0
        self._closed = False
        self._patient_until = 0.0
        self._thread = threading.Thread(target=self._run, name="tail-writer", daemon=True)
        self._thread.start()

    def put(self, tail: LeavingTail) -> bool:
        """Have a tail written; False: the queue is full, or closed."""
        with self._changed:
            while not self._closed and self._bytes and self._bytes + tail.nbytes > self._room:
                left = self._patient_until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return False
            if self._closed:
                return False
            self._waiting.append(tail)
            self._bytes += tail.nbytes
            self._changed.notify_all()
            return True

    def wait_for_room(self, seconds: float) -> None:
        """From now on, for so many seconds, let `put` wait while the queue is full."""
        self._patient_until = time.monotonic() + seconds

    def close(self, seconds: float) -> int:
        """Take no more, and wait so long for what is in the queue.

        Returns:
            Tails that were not written in time: they are lost when the process ends.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            lost = len(self._waiting) + self._thread.is_alive()
            self._waiting.clear()
            return lost

    def _run(self) -> None:
        while (tail := self._next()) is not None:
            try:
                self._write(tail)
            except Exception:  # noqa: BLE001 - the others wait to be written
                _log.exception("a tail was lost in an unexpected way")
            with self._changed:
                self._bytes -= tail.nbytes
                self._changed.notify_all()
            del tail  # its memory is free now, not when the next one comes

    def _next(self) -> LeavingTail | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            return self._waiting.popleft()
