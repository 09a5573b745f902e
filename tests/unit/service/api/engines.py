"""Engines for tests of the API: real ones, whose steps are counted and can be made slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.local import EngineBackend
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates, Way
from xkv_service.engine.messages import EngineState
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel


class AlwaysLoad(LoadingRates):
    """A tiny model prefills faster than anything loads; these rates have the factors used all the same."""

    def decide(self, tokens: int, nbytes: int | None = None) -> Way:
        return "load"

    def deadline_s(self, tokens: int) -> float:
        return 30.0


class PacedBackend(EngineBackend):
    """A backend whose engine takes `step_s` seconds longer for each step.

    Attributes:
        steps: forwards so far.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.engine = engine
        self.step_s = 0.0
        self.steps = 0

    @property
    def state(self) -> EngineState:
        return self.engine.state()

    @property
    def busy(self) -> int:
        """Requests that the engine has."""
        return self.state.running + self.state.waiting

    def step(self, *_: Any) -> None:
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
            hook = model.register_forward_pre_hook(backend.step)
            try:
                yield backend
            finally:
                hook.remove()
    finally:
        pool.close()
