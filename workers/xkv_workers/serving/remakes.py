"""`Remakes`: has damaged artifacts made again as they were, from the last prompts that held all of them."""

from __future__ import annotations

import logging
import threading
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from xkv_artifacts.errors import XKVError
from xkv_artifacts.keys import artifact_id
from xkv_service.api.backend import NewPrefix
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.messages import GenerationRequest, Origin
from xkv_service.spec import CompressionSpec

MOST_TOKENS = 1 << 24
"""Of all artifacts that are remembered, 4 bytes each."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    origin: Origin
    token_ids: array[int]


class Remakes:
    """What the artifacts asked for lately were made from. Every method may be called from any thread.

    Args:
        fingerprint: of the served model. make: told what to make; it must be quick.
        most_tokens: of all that is remembered; what was asked for least recently is forgotten first.
    """

    def __init__(
        self, fingerprint: str, make: Callable[[NewPrefix], object], most_tokens: int = MOST_TOKENS
    ) -> None:
        self._fingerprint, self._make, self._most_tokens = fingerprint, make, most_tokens
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._tokens = 0
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @property
    def counters(self) -> dict[str, float]:
        """`remakes_asked`; `remakes_impossible`: no prompt was known that holds all tokens."""
        with self._lock:
            return dict(self._counters)

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

    def damaged(self, name: str, failure: LoadFailure) -> None:
        """An artifact was found damaged: have it made again, once."""
        with self._lock:
            source = self._forget(name)
        new = None if source is None else self._new(name, source)
        with self._lock:
            self._counters["remakes_impossible" if new is None else "remakes_asked"] += 1
        if new is None:
            _log.warning("artifact %s is not made again: no prompt holds all of it", name[:12])
        else:
            _log.warning("artifact %s is made again: %s", name[:12], failure.detail)
            self._make(new)

    def _forget(self, name: str) -> _Source | None:
        source = self._sources.pop(name, None)
        if source is not None:
            self._tokens -= source.origin.tokens
        return source

    def _new(self, name: str, source: _Source) -> NewPrefix | None:
        """What makes the same artifact; None where it would be another."""
        origin, ids = source.origin, source.token_ids
        try:
            spec = CompressionSpec.from_canonical(origin.spec)
            same = artifact_id(self._fingerprint, origin.namespace, ids, spec.canonical()) == name
        except XKVError:
            return None
        if not same:
            return None
        return NewPrefix(origin.namespace, ids, origin.name, origin.sha256, spec=spec)
