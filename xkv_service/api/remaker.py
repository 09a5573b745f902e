"""`Remaker`: has damaged and missing artifacts made again, where it is known what they were made from."""

from __future__ import annotations

import logging
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from xkv_artifacts.errors import XKVError
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.origin import Origin
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import NewPrefix
from xkv_service.spec import CompressionSpec

LATE_S = 5.0
"""Seconds in which a missing blob may still come: a store that is behind mostly catches up in them."""
_log = logging.getLogger(__name__)


class Remaker:
    """Asks for artifacts of one model. Every method may be called from any thread.

    Args:
        store: where they are. fingerprint: of the model. make: told what to make; it must be quick.
    """

    def __init__(self, store: ArtifactStore, fingerprint: str, make: Callable[[NewPrefix], object]) -> None:
        self._store, self._fingerprint, self._make = store, fingerprint, make
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @property
    def counters(self) -> dict[str, float]:
        """`remakes_asked`; `remakes_impossible`: it is not known what it was made from."""
        with self._lock:
            return dict(self._counters)

    def ask(
        self, name: str, origin: Origin | None, token_ids: array[int], fault: str, *, missing: bool = False
    ) -> None:
        """An artifact was found damaged or missing: have it made again.

        Args:
            origin: what it was made from, None where that is not known.
            token_ids: its own and more, or others: its id says which.
            fault: what was found, one line. missing: its blob is gone, and may come by itself.
        """
        try:
            new = None if origin is None else self._new(name, origin, token_ids)
            if new is not None and missing:
                new = replace(new, wait_s=LATE_S)
            if new is not None:
                self._store.damaged.take(name)
            with self._lock:
                self._counters["remakes_impossible" if new is None else "remakes_asked"] += 1
            if new is None:
                unknown = (
                    "what it was made from is not known" if origin is None else "no prompt holds all of it"
                )
                _log.warning("artifact %s is not made again, %s: %s", name[:12], unknown, fault)
            else:
                _log.warning("artifact %s is made again: %s", name[:12], fault)
                self._make(new)
        except Exception:  # noqa: BLE001 - whoever found it has a prompt to answer
            _log.exception("artifact %s is lost, and nobody could be told: %s", name[:12], fault)

    def begins(self, name: str, origin: Origin, token_ids: array[int]) -> bool:
        """Whether these tokens begin with all of an artifact's: its id says so."""
        return self._spec(name, origin, token_ids) is not None

    def _spec(self, name: str, origin: Origin, token_ids: array[int]) -> CompressionSpec | None:
        """What an artifact was made with; None: these are not its tokens."""
        ids = token_ids[: origin.tokens]
        try:
            spec = CompressionSpec.from_canonical(origin.spec)
            same = artifact_id(self._fingerprint, origin.namespace, ids, spec.canonical()) == name
        except XKVError:
            return None
        return spec if same else None

    def _new(self, name: str, origin: Origin, token_ids: array[int]) -> NewPrefix | None:
        """What makes the same artifact, or its prefix over other bases; None: these are not its tokens."""
        spec = self._spec(name, origin, token_ids)
        if spec is None:
            return None
        ids = token_ids[: origin.tokens]
        new = NewPrefix(origin.namespace, ids, origin.name, origin.sha256, spec=spec, replaces=name)
        if self._has_lost_its_bases(name, spec):
            self._store.catalog.drop(name)  # its blob stays, for a calibration that is brought back
            return replace(new, spec=None, ratio=spec.ratio)
        return new

    def _has_lost_its_bases(self, name: str, spec: CompressionSpec) -> bool:
        """Whether an artifact is whole, and the calibration whose bases it shares is gone."""
        if spec.basis != "calibrated" or spec.calibration is None:
            return False
        return self._store.blobs.exists(name) and not self._store.calibrations.blobs.exists(spec.calibration)
