"""`StateBoard`: where replicas say what they hold, for whoever shows it. A Ray actor."""

from __future__ import annotations

import time

from xkv_service.engine.messages import EngineState

_STALE_S = 10.0


class StateBoard:
    """The last word of each replica; one that is silent for 10 s is gone."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[float, EngineState]] = {}

    def put(self, replica: str, state: EngineState) -> None:
        """Note a replica's state."""
        self._states[replica] = (time.monotonic(), state)

    def all(self) -> list[EngineState]:
        """The states of all replicas that are alive."""
        now = time.monotonic()
        self._states = {name: said for name, said in self._states.items() if now - said[0] < _STALE_S}
        return [state for _, state in self._states.values()]
