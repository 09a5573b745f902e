"""Engines for tests of the API: real ones, whose steps are counted and can be made slow."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.local import EngineBackend
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates, Way
from xkv_service.engine.messages import EngineState, Event, GenerationRequest
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    """An answer is told before its sender has put everything down; and machines may be slow."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class AlwaysLoad(LoadingRates):
    """A tiny model prefills faster than anything loads; these rates have the factors used all the same."""

    def decide(self, tokens: int, nbytes: int | None = None, rounds: int = 1) -> Way:
        return "load"

    def deadline_s(self, tokens: int) -> float:
        return 30.0

    def everything_is_faster(self, prefix: int, tokens: int, held: int) -> bool:
        return False


class PacedBackend(EngineBackend):
    """A backend whose engine takes `step_s` seconds longer for each step, and none while it is held.

    Attributes:
        steps: forwards so far. asked: requests so far. closed: those of them that are over for the client.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.engine = engine
        self.step_s = 0.0
        self.steps = self.asked = self.closed = 0
        self._go = threading.Event()
        self._go.set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request."""
        self.asked += 1
        try:
            async with aclosing(super().generate(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.closed += 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step begins until the block ends."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    @property
    def state(self) -> EngineState:
        return self.engine.state()

    @property
    def busy(self) -> int:
        """Requests that the engine has."""
        state = self.state
        return state.running + state.waiting

    def step(self) -> None:
        self._go.wait()
        time.sleep(self.step_s)
        self.steps += 1


@contextmanager
def paced_backend(
    loaded: LoadedModel, store: ArtifactStore, settings: EngineSettings | None = None
) -> Iterator[PacedBackend]:
    """An engine over the model and the store, until the block ends."""
    model, fingerprint = loaded.model, loaded.identity.fingerprint
    pool = PrefixPool(model, store, fingerprint=fingerprint, rates=AlwaysLoad(1.0))
    try:
        with Engine(loaded, settings, pool) as engine:
            backend = PacedBackend(engine)
            hook = model.register_forward_pre_hook(
                lambda *_: backend.step()
            )  # a copy of the model copies no backend
            try:
                yield backend
            finally:
                hook.remove()
    finally:
        pool.close()
