"""`Presence`: what tells replicas that an HTTP process is there. `callers.py` says how they use it."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from typing import Any, Final

_BOARD_S: Final = 60.0
"""For the board to note this process: a guess, for a busy machine."""
_AGAIN_S: Final = 5.0
"""A board that died and came back knows nobody, and a replica that starts then asks it."""


class Presence:
    """An object that this process owns and that is never there, noted on the state board.

    Args:
        board: an actor handle of a `StateBoard`.

    Attributes:
        caller: the name of this process.
    """

    def __init__(self, board: Any) -> None:
        self.caller = secrets.token_hex(8)
        # Goes on where the board dies and comes back.
        self._noted = [board.never.options(max_task_retries=-1).remote()]
        self._board, self._told = board, time.monotonic()
        self._telling: asyncio.Task[None] | None = None
        self._tell().future().result(_BOARD_S)

    def tell_again(self) -> None:
        """Tell the board if it does not know, which is asked every few seconds. To be called on a loop."""
        if time.monotonic() - self._told > _AGAIN_S:
            self._told = time.monotonic()
            self._telling = asyncio.get_running_loop().create_task(self._tell_if_unknown())

    async def _tell_if_unknown(self) -> None:
        from ray.exceptions import RayActorError

        with suppress(RayActorError, asyncio.TimeoutError):  # it is down, or slow: the next time, then
            if not await asyncio.wait_for(self._board.knows.remote(self.caller), _AGAIN_S):
                self._tell()

    def _tell(self) -> Any:
        return self._board.meet.remote(self.caller, self._noted)
