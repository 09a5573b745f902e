"""`StopSignals`: SIGTERM and Ctrl-C, from before a server starts until it has ended."""

from __future__ import annotations

import signal
import threading


class StartBrokenOff(BaseException):
    """A signal came before the server had started.

    Not a KeyboardInterrupt: after one that went through `exec`, as imports do, Python ends with its signal
    although it was caught.
    """


class StopSignals:
    """The first signal stops the server, or breaks off its start; a second one means: at once.

    To be made on the main thread.

    Attributes:
        stop, hurry: set by the first and by the second.
    """

    def __init__(self) -> None:
        self.stop, self.hurry = threading.Event(), threading.Event()
        self._starting = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heed)

    def started(self) -> None:
        """From now on nothing is broken off: `stop` is waited for."""
        self._starting = False

    def _heed(self, *_: object) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()
        if self._starting:
            self._starting = False  # what it has started is taken down in peace
            raise StartBrokenOff
