"""`StateBoard`: where replicas say what they hold, for whoever shows it, and HTTP processes that they are
there. A Ray actor."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from xkv_service.engine.messages import EngineState

_STALE_S = 10.0
_LOST_S = 600.0


class StateBoard:
    """The last word of each replica; one that is silent for 10 s is gone.

    What those that are gone had counted stays, so that counters which add up all replicas never fall.
    """

    def __init__(self) -> None:
        self._states: dict[str, tuple[float, EngineState]] = {}
        self._left: Counter[str] = Counter()
        self._callers: dict[str, list[Any]] = {}

    def put(self, replica: str, state: EngineState) -> None:
        """Note a replica's state."""
        self._states[replica] = (time.monotonic(), state)

    def leave(self, replica: str, state: EngineState) -> None:
        """A replica's last word: it ends."""
        self._states.pop(replica, None)
        self._left.update(state.counters)

    async def never(self) -> None:
        """Never comes to an end. Whoever calls this owns what it returns, for `meet`."""
        await asyncio.Event().wait()

    def meet(self, caller: str, presence: list[Any]) -> None:
        """Note a process that calls replicas, by the ObjectRef of an object that it owns and that is never
        there: in a list, since Ray would wait for it."""
        self._callers[caller] = presence

    def knows(self, caller: str) -> bool:
        """Whether a process was noted. One that tells without need is not free: Ray keeps what comes of each
        reference to an object that is never there."""
        return caller in self._callers

    def presence_of(self, caller: str) -> list[Any]:
        """As it was given to `meet`; empty where it was not."""
        return self._callers.get(caller, [])

    def all(self) -> list[EngineState]:
        """The states of all replicas that are alive; to the first one's counters those of all that are gone
        are added."""
        now = time.monotonic()
        for name, (said, state) in list(self._states.items()):
            if now - said > _LOST_S:
                self.leave(name, state)
        gone, alive = Counter(self._left), []
        for said, state in self._states.values():
            if now - said < _STALE_S:
                alive.append(state)
            else:
                gone.update(state.counters)
        if alive:
            gone.update(alive[0].counters)
            alive[0] = replace(alive[0], counters=dict(gone))
        return alive
