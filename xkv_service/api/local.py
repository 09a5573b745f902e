"""`EngineBackend`: an engine of this process behind the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from xkv_service.engine.engine import Engine
from xkv_service.engine.messages import EngineState, Event, Failed, Finished, GenerationRequest


class EngineBackend:
    """A `Backend` over one engine. The engine stays its maker's to close."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def waiting(self) -> int:
        """None: the engine has got them all, those that it has not begun too."""
        return 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request; closing the iterator takes it out of the batch."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        cancel = self._engine.submit(request, tell)
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, Finished | Failed)
                yield event
        finally:
            if not ended:
                cancel()

    async def states(self) -> list[EngineState]:
        """What the engine holds and does now; nothing once its thread has ended."""
        return [self._engine.state()] if self._engine.alive else []
