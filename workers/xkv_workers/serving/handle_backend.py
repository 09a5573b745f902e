"""`HandleBackend`: engine replicas behind the API, reached through a Serve handle."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from xkv_service.engine.messages import (
    EngineState,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Started,
    waited_too_long,
)
from xkv_workers.serving.presence import Presence

_log = logging.getLogger(__name__)
_ROUTED_TOKENS = 256
_TRIES = 3
_BOARD_S = 1.0
"""For the board to answer, of the 2 s that whoever asks gives."""
_STALE_S = 10.0
"""As long as the board itself believes a replica that is silent."""


class HandleBackend:
    """A `Backend` over replicas. Requests of one prefix, or one conversation, go to one replica.

    Args:
        engine: the handle of the engine deployment. board: of the `StateBoard`.
        presence: of this process, without which its requests are given up.
    """

    def __init__(self, engine: Any, board: Any, presence: Presence) -> None:
        self._engine, self._board, self._presence = engine, board, presence
        self._waiting = 0
        self._states: list[EngineState] = []
        self._heard = -math.inf

    @property
    def waiting(self) -> int:
        """Requests that Serve's router has given to no replica yet."""
        return self._waiting

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request; closing the iterator cancels it on its replica.

        Where a replica dies, another one begins the request anew as long as its client was told nothing: what
        was told of the first replica would not hold for the second. So a stream that has begun fails.
        """
        for left in reversed(range(_TRIES)):
            told = False
            events = self._events(request)
            try:
                async for event in events:
                    told = request.streamed or isinstance(event, Finished | Failed)
                    yield event
                return
            except Exception as error:  # noqa: BLE001 - Ray's own, of many kinds, and whatever the replica raised
                failed, again = _failure_of(error)
                if told or not left or not again:
                    yield failed
                    return
                _log.warning("request %s starts again: %s", request.id, error)
            finally:
                await events.aclose()

    async def states(self) -> list[EngineState]:
        """What each replica held and did a second ago; what was heard last where the board is slow to say it,
        or died and comes back.

        Raises:
            asyncio.TimeoutError, RayActorError: nothing was heard for 10 s.
        """
        from ray.exceptions import RayActorError

        try:
            self._states = await asyncio.wait_for(self._board.all.remote(), _BOARD_S)
            self._heard = time.monotonic()
        except (asyncio.TimeoutError, RayActorError):
            if time.monotonic() - self._heard > _STALE_S:
                raise
        return self._states

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        handle = self._engine.options(stream=True, session_id=routing_key(request))
        self._presence.tell_again()
        response = handle.generate.remote(request, self._presence.caller)
        events = aiter(response)
        ended = False
        try:
            waited = await self._taken(events, request.queue_timeout_s)
            if waited is None:
                yield waited_too_long(request.queue_timeout_s)
                return
            async for event in events:
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Started):
                    event = replace(event, queued_seconds=waited + event.queued_seconds)
                yield event
        finally:
            if not ended:
                response.cancel()

    async def _taken(self, events: Any, most_s: float) -> float | None:
        """Wait until a replica has the request; for how many seconds, or None after `most_s` in vain."""
        began = time.perf_counter()
        self._waiting += 1
        try:
            await asyncio.wait_for(anext(events), most_s or None)
        except asyncio.TimeoutError:
            return None
        finally:
            self._waiting -= 1
        return time.perf_counter() - began


def routing_key(request: GenerationRequest) -> str:
    """What decides the replica: the artifact, else how the prompt begins, in its namespace."""
    if request.match is not None:
        return request.match.artifact_id
    beginning = f"{request.namespace} {request.token_ids[:_ROUTED_TOKENS]}"
    return hashlib.sha256(beginning.encode()).hexdigest()


def _failure_of(error: Exception) -> tuple[Failed, bool]:
    """What a client is told, and whether another replica may do better."""
    from ray.exceptions import RayActorError, RaySystemError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, RayActorError | RaySystemError):
        return Failed("overloaded", "the replica that answered died", retry_after_s=1.0), True
    if isinstance(error, RayServeException):
        return Failed("overloaded", "no replica can answer now", retry_after_s=2.0), True
    _log.error("a replica failed", exc_info=error)
    return Failed("internal", f"the replica failed: {type(error).__name__}"), False
