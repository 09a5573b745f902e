"""What a run would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from xkv_workers.corpus import Rejected
from xkv_workers.low_fidelity import Standard
from xkv_workers.messages import PrefixJob, Stored
from xkv_workers.report import DocumentError

ROUGH_TOKENS_PER_SECOND = {"cpu": 1_000.0, "cuda": 20_000.0}
"""A guess for a model that was never precomputed here: a small one on CPU, one of 8 B parameters on a GPU."""

START_SECONDS = 10.0
"""Until the first worker is ready: Ray, torch and the model."""

Action = Literal["compute", "reuse", "same as another"]


class Sized(Protocol):
    """The bytes of a prefix, before and after."""

    @property
    def bytes_full(self) -> int:
        """Bytes of the exact cache."""

    @property
    def bytes_stored(self) -> int:
        """Bytes of the artifact's file, an upper bound."""


@dataclass(frozen=True)
class Line:
    """One document of the plan. `bytes`: stored already, or at most to be stored."""

    id: str
    document: str
    action: Action
    tokens: int
    bytes_full: int
    bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a run would do. Tokens, bytes and seconds count what would be computed; `calibration` is an id."""

    documents: int
    compute: int
    reuse: int
    failed: int
    errors: tuple[DocumentError, ...]
    tokens: int
    bytes_full: int
    bytes_stored: int
    seconds: float
    seconds_basis: str
    plan: tuple[Line, ...]
    calibration: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The forecast as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Rate:
    """Tokens per second, and where the figure is from."""

    tokens_per_second: float
    basis: str

    @classmethod
    def of(cls, remembered: float | None, device: str) -> Rate:
        """The catalog's remembered rate, or a guess that says so."""
        if remembered is not None:
            return cls(remembered, f"speed measured before with this model on {device}")
        return cls(ROUGH_TOKENS_PER_SECOND[device], f"a rough guess: this model was never run on {device}")


def forecast(
    plan: Iterable[PrefixJob | Rejected],
    find: Callable[[PrefixJob], Stored | None],
    size: Callable[[int], Sized],
    rate: Rate,
    standard: Standard,
) -> Forecast:
    """Go through the plan and count.

    Args:
        plan: every document. find: what the store has already. size: bytes of a prefix of so many tokens.
        standard: documents whose stored artifact falls short of it fail.
    """
    lines: list[Line] = []
    errors: list[DocumentError] = []
    seen: set[str] = set()
    for item in plan:
        if isinstance(item, Rejected):
            errors.append(DocumentError(item.uri, item.reason))
            continue
        stored = find(item)
        if stored is not None and (reason := standard.shortfall(stored)):
            errors.append(DocumentError(item.document.uri, reason))
            continue
        lines.append(_line(item, stored, size(item.tokens), item.artifact_id in seen))
        seen.add(item.artifact_id)
    return _total(lines, errors, rate)


def _total(lines: list[Line], errors: list[DocumentError], rate: Rate) -> Forecast:
    todo = [line for line in lines if line.action == "compute"]
    tokens = sum(line.tokens for line in todo)
    return Forecast(
        documents=len(lines) + len(errors),
        compute=len(todo),
        reuse=len(lines) - len(todo),
        failed=len(errors),
        errors=tuple(errors),
        tokens=tokens,
        bytes_full=sum(line.bytes_full for line in todo),
        bytes_stored=sum(line.bytes for line in todo),
        seconds=round(tokens / rate.tokens_per_second + START_SECONDS, 1) if todo else 0.0,
        seconds_basis=rate.basis,
        plan=tuple(lines),
    )


def _line(job: PrefixJob, stored: Stored | None, size: Sized, seen: bool) -> Line:
    action: Action = "same as another" if seen else "compute" if stored is None else "reuse"
    return Line(
        id=job.artifact_id if stored is None else stored.own_id,
        document=job.document.uri,
        action=action,
        tokens=job.tokens,
        bytes_full=size.bytes_full if stored is None else stored.bytes_full,
        bytes=size.bytes_stored if stored is None else stored.bytes_stored,
    )
