"""`Backend`: what the HTTP app needs of whatever runs the model: an engine here, or replicas elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from xkv_service.engine.messages import EngineState, Event, GenerationRequest


class Backend(Protocol):
    """Runs requests. Every method may be called by many requests at once, on one event loop."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """The events of one request. Closing the iterator cancels the request within a step."""

    async def states(self) -> list[EngineState]:
        """What each engine holds and does now."""
