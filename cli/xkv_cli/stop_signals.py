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
        broke_off_start: whether `StartBrokenOff` was raised. It may come out as something else, or not at
            all: compiled code that does not look for exceptions turns it into a SystemError, and Python drops
            it in finalizers.
    """

    def __init__(self) -> None:
        self.stop, self.hurry = threading.Event(), threading.Event()
        self.broke_off_start = False
        self._starting = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heed)

    def started(self) -> None:
        """From now on nothing is broken off: `stop` is waited for.

        Raises:
            StartBrokenOff: a signal had come, and what it raised was dropped on its way.
        """
        self._starting = False
        if self.broke_off_start:
            raise StartBrokenOff

    def _heed(self, *_: object) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()
        if self._starting:
            self._starting = False  # what it has started is taken down in peace
            self.broke_off_start = True
            raise StartBrokenOff
