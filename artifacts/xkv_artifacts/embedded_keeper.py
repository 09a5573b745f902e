"""Brings an embedded Redis back when it dies, for servers: their requests do not wait until one tries."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from xkv_artifacts.embedded import EmbeddedRedis
from xkv_artifacts.embedded_watch import Connection
from xkv_artifacts.errors import XKVError
from xkv_artifacts.reports import Rebuild

_log = logging.getLogger(__name__)
_LOOK_S = 0.5
_STEADY_S = 60.0
"""A server that lived so long is brought back at once; one that dies sooner after ever longer pauses."""
_LONGEST_PAUSE_S = 60.0


@contextmanager
def kept_alive(embedded: EmbeddedRedis, on_back: Callable[[], Rebuild | None]) -> Iterator[None]:
    """While the block runs, the server is started again within a second of its death.

    The first try comes at once. While it does not start, or dies again within a minute, tries come after 1,
    2, 4 and more seconds, then once a minute. Each is logged.

    Args:
        on_back: called on a thread, after each time, to list again what was lost; what it raises of XKVError
            is logged.
    """
    ending = threading.Event()
    keeper = _Keeper(embedded, on_back, ending)
    thread = threading.Thread(target=keeper.run, name="xkv-embedded-keeper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


class _Keeper:
    def __init__(
        self, embedded: EmbeddedRedis, on_back: Callable[[], Rebuild | None], ending: threading.Event
    ) -> None:
        self._embedded, self._on_back, self._ending = embedded, on_back, ending
        self._path = embedded.url.removeprefix("unix://")
        self._failures = 0

    def run(self) -> None:
        while not self._ending.is_set():
            began = time.monotonic()
            self._wait_for_death()
            if time.monotonic() - began >= _STEADY_S:
                self._failures = 0
            pause = min(2.0 ** (self._failures - 1), _LONGEST_PAUSE_S) if self._failures else 0.0
            if not self._ending.wait(pause):
                self._bring_back()
                self._failures += 1

    def _wait_for_death(self) -> None:
        """Until the server is gone, which a connection to it shows at once, or the block is over."""
        with suppress(OSError), Connection(self._path) as connection:
            while not self._ending.is_set() and not connection.wait_closed(_LOOK_S):
                pass

    def _bring_back(self) -> None:
        try:
            self._embedded.ensure()
            _log.warning("the embedded Redis had died, and runs again")
            if (listed := self._on_back()) is not None:
                _log.warning("the embedded Redis was empty: %d prefixes are listed again", listed.artifacts)
        except XKVError as error:
            _log.warning("the embedded Redis died: %s", error.message)
