"""What other threads tell the engine's: plain values in its inbox."""

from __future__ import annotations

from dataclasses import dataclass

from xkv_artifacts.manifest import PartFidelity
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.head_start import Ran
from xkv_service.engine.kept_tails import KeptTail
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.sequence import Sequence


@dataclass(frozen=True)
class Submitted:
    """A request that came in."""

    sequence: Sequence


@dataclass(frozen=True)
class Cancelled:
    """Nobody wants its answer any more."""

    sequence: Sequence


@dataclass(frozen=True)
class Loaded:
    """Its prefix, held once for it, or why there is none, and what was run behind it meanwhile.

    Args:
        part: of the artifact that was asked for, None: all of it.
    """

    sequence: Sequence
    answer: Prefix | LoadFailure
    ran: Ran | None = None
    part: PartFidelity | None = None


@dataclass(frozen=True)
class TailLoaded:
    """A stored tail that holds more of its prompt than it has, prefix held once, or None."""

    sequence: Sequence
    tail: KeptTail | None


Message = Submitted | Cancelled | Loaded | TailLoaded
