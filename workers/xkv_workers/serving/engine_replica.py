"""`EngineReplica`: one model, its resident prefixes and its engine, as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from xkv_service.api.remaker import Remaker
from xkv_service.engine.messages import EngineState, Event, GenerationRequest
from xkv_workers.place import open_place
from xkv_workers.serving.callers import Callers
from xkv_workers.serving.logs import join_serve
from xkv_workers.serving.process_end import end_process
from xkv_workers.serving.remakes import Remakes
from xkv_workers.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
_REPORT_S = 1.0
_GOODBYE_S = 1.0
_STUCK_S = 600.0
"""A step that takes longer than a request may is not one that goes on."""


class EngineReplica:
    """Loads the model once, and serves until Serve ends it.

    Args:
        board: an actor handle of a `StateBoard`. compressor: a Serve handle; it makes lost prefixes anew.
    """

    def __init__(self, settings: ServeSettings, board: Any, compressor: Any) -> None:
        join_serve()
        self._loaded, self._store = open_place(settings.place)
        # Only a replica needs these, not the process that deploys it.
        from xkv_service.api.local import EngineBackend
        from xkv_service.engine.engine import Engine
        from xkv_service.engine.prefix_pool import PrefixPool
        from xkv_service.engine.stored_tails import StoredTails

        fingerprint = self._loaded.identity.fingerprint
        self._remaker = Remaker(self._store, fingerprint, lambda new: compressor.create.remote(new))
        self._remakes = Remakes(self._remaker)
        self._pool = PrefixPool(
            self._loaded.model,
            self._store,
            settings.engine.selection,
            settings.prefix_bytes,
            fingerprint=fingerprint,
            on_lost=self._remakes.lost,
        )
        self._stored = None
        if settings.engine.stored_tail_bytes:
            self._stored = StoredTails(self._loaded, self._store.tails, self._pool, settings.engine)
        self._engine = Engine(
            self._loaded,
            settings.engine,
            self._pool,
            self._stored,
            on_death=end_process,
            beside_bytes=self._loaded.model.get_memory_footprint(),  # the compressor's model may be there
        )
        self._backend = EngineBackend(self._engine)
        self._board, self._name = board, _replica_name()
        self._callers = Callers(board.presence_of.remote)
        self._reporting: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest, caller: str) -> AsyncIterator[Event | None]:
        """None at once, as a sign that the request is here, then its events. Cancelling the call takes it out
        of the batch, and so does the death of its caller."""
        yield None
        self._report_from_now_on()
        self._remakes.note(request)
        events = self._backend.generate(request)
        with self._callers.call(caller):
            try:
                async for event in events:
                    yield event
            finally:
                await events.aclose()

    async def state(self) -> EngineState:
        """What the engine holds and does now."""
        return self._state()

    async def check_health(self) -> None:
        """Asked by Serve again and again.

        Where the engine hangs the process ends, as it does where the engine dies: Serve would wait for its
        answers, and others begin them again.
        """
        self._report_from_now_on()
        if self._engine.stuck_s > _STUCK_S:
            _log.error("a step of the engine takes more than %d s: this replica ends", _STUCK_S)
            end_process()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it did not come up
            self._engine.close()
            if self._stored is not None:
                self._stored.close()
            self._say_goodbye()
            self._pool.close()
            self._store.close()

    def _say_goodbye(self) -> None:
        said = self._board.leave.remote(self._name, self._state())
        with suppress(Exception):  # the board may be gone before; Serve kills this process any moment now
            said.future().result(_GOODBYE_S)

    def _state(self) -> EngineState:
        state = self._engine.state()
        return replace(state, counters=state.counters | self._remaker.counters)

    def _report_from_now_on(self) -> None:
        """Tell the board every second, on the loop that Serve calls this replica on."""
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.get_running_loop().create_task(self._report())

    async def _report(self) -> None:
        while self._engine.alive:
            self._board.put.remote(self._name, self._state())
            await asyncio.sleep(_REPORT_S)


def _replica_name() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)
