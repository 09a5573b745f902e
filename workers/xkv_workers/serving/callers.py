"""`Callers`: whose calls a replica works on, so that it works for nobody who is gone.

A client that goes away is told of by the process that it was connected to. When that process dies itself, Ray
runs its calls to their end, and nobody hears of them. So each caller owns an object that is never there, and
sends a reference to it: who waits for it is told when its owner has died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """A process that makes calls.

    Args:
        presence: the ObjectRef of an object that it owns and that is never there, as of `StateBoard.never`.
    """

    presence: Any


class Callers:
    """Calls under way by who made them. For one event loop."""

    def __init__(self) -> None:
        self._calls: dict[Caller, set[asyncio.Task[Any]]] = {}
        self._watches: set[asyncio.Task[None]] = set()

    @contextmanager
    def call(self, caller: Caller) -> Iterator[None]:
        """A call, run by the current task, which is cancelled when its caller has died."""
        task = asyncio.current_task()
        assert task is not None
        if caller not in self._calls:
            self._calls[caller] = set()
            watch = asyncio.create_task(self._watch(caller))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        calls = self._calls[caller]
        calls.add(task)
        try:
            yield
        finally:
            calls.discard(task)

    async def _watch(self, caller: Caller) -> None:
        from ray.exceptions import OwnerDiedError, RayError

        try:
            await caller.presence
        except OwnerDiedError:
            calls = self._calls[caller]
            if calls:
                _log.warning("an HTTP process died: %d of its requests are given up", len(calls))
            for task in calls:
                task.cancel()
        except RayError as error:
            _log.warning("the end of an HTTP process will not be seen: %s", error)
        finally:
            del self._calls[caller]
