"""Loads that a pool has under way, and who waits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from xkv_artifacts.manifest import PartFidelity
from xkv_service.decoding.arriving import Arriving
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.loader_threads import Job
from xkv_service.engine.parts import resident_key
from xkv_service.engine.prefix_loading import Announced

Answer = Prefix | LoadFailure
OnDone = Callable[[Answer], None]
OnArriving = Callable[[Arriving], None]

CALIBRATION = "calibration "
"""Before the ids of calibrations, which are kept among the prefixes that share their bases."""


@dataclass(eq=False)
class Waiter:
    """Somebody who asked for the first `tokens` tokens of an artifact."""

    tokens: int
    on_done: OnDone
    on_arriving: OnArriving | None = None


@dataclass(eq=False)
class Load:
    """One artifact on its way into memory, or a part of it.

    Attributes:
        began: when its thread took it. shared_bytes: of a calibration that had to be read for it.
        overdue: whether somebody gave up waiting while it ran. measured: whether the rates know how long it
            took. in_vain: whether they know that it was waited for in vain.
        spoiled: whether the rest of its file was found damaged or missing meanwhile.
    """

    artifact_id: str
    part: PartFidelity | None = None
    waiters: list[Waiter] = field(default_factory=list)
    job: Job | None = None
    began: float | None = None
    announced: Announced | None = None
    shared_bytes: int = 0
    overdue: bool = False
    measured: bool = False
    in_vain: bool = False
    spoiled: bool = False

    @property
    def key(self) -> str:
        """What it will be called among resident prefixes."""
        return resident_key(self.artifact_id, self.part)

    @property
    def needed_bytes(self) -> int:
        """As far as that is known."""
        return self.shared_bytes + (self.announced.resident_bytes if self.announced else 0)


class NoRoom(Exception):
    """Prefixes in use leave no room for a load now."""
