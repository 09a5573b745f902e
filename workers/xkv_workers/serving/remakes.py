"""`Remakes`: has damaged and missing artifacts made again, from the last prompts that held all of them."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from xkv_artifacts.origin import Origin
from xkv_service.api.remaker import Remaker
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.messages import GenerationRequest

MOST_TOKENS = 1 << 24
"""Of all artifacts that are remembered, 4 bytes each."""


@dataclass(frozen=True)
class _Source:
    origin: Origin
    token_ids: array[int]


class Remakes:
    """What the artifacts asked for lately were made from. Every method may be called from any thread.

    Args:
        remaker: asked to make them.
        most_tokens: of all that is remembered; what was asked for least recently is forgotten first.
    """

    def __init__(self, remaker: Remaker, most_tokens: int = MOST_TOKENS) -> None:
        self._remaker, self._most_tokens = remaker, most_tokens
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def note(self, request: GenerationRequest) -> None:
        """Remember the tokens of a request's artifact, where its prompt holds them all."""
        match = request.match
        if match is None or match.origin is None:
            return
        name, origin = match.artifact_id, match.origin
        with self._lock:
            if name in self._sources:  # the id says which tokens they are
                self._sources.move_to_end(name)
                return
            self._sources[name] = _Source(origin, array("i", request.token_ids[: origin.tokens]))
            self._tokens += origin.tokens
            while self._tokens > self._most_tokens:
                self._forget(next(iter(self._sources)))

    def lost(self, name: str, failure: LoadFailure) -> None:
        """An artifact was found damaged or missing: have it made again, once."""
        with self._lock:
            source = self._forget(name)
        origin, token_ids = (None, array("i")) if source is None else (source.origin, source.token_ids)
        self._remaker.ask(name, origin, token_ids, failure.fault, missing=failure.reason == "missing")

    def _forget(self, name: str) -> _Source | None:
        source = self._sources.pop(name, None)
        if source is not None:
            self._tokens -= source.origin.tokens
        return source
