"""`Callers`: whose calls a replica works on, so that it works for nobody who is gone.

A client that goes away is told of by the process that it was connected to. When that process dies itself, Ray
runs its calls to their end, and nobody hears of them. So each caller owns an object that is never there, and
gives the state board a reference to it: who waits for it is told when its owner has died. Calls have the
caller's name alone: Ray keeps the arguments of each one for as long as a reference in them has not come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)


class Callers:
    """Calls under way by who made them. For one event loop.

    Args:
        presence_of: as `StateBoard.presence_of`, awaited.
    """

    def __init__(self, presence_of: Callable[[str], Awaitable[list[Any]]]) -> None:
        self._presence_of = presence_of
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}
        self._watches: set[asyncio.Task[None]] = set()

    @contextmanager
    def call(self, caller: str) -> Iterator[None]:
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

    async def _watch(self, caller: str) -> None:
        from ray.exceptions import OwnerDiedError, RayError

        try:
            for presence in await self._presence_of(caller):
                await presence
            _log.warning("the end of an HTTP process will not be seen: nothing is known of it")
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
