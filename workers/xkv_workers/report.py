"""What became of every document of a run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from xkv_artifacts.manifest import DocumentRef
from xkv_workers.messages import Retry, Stored

LOW_FIDELITY = 0.9
"""Below it a person is warned. Compressed so far that answers were lost, documents of the bundled model had
0.78 to 0.95; compressed without loss, 0.92 and more (`docs/defaults.md`)."""


@dataclass(frozen=True)
class DocumentError:
    """A document that has no artifact, and why."""

    document: str
    reason: str


@dataclass(frozen=True)
class ArtifactLine:
    """A document's artifact. `ratio`: bytes of the exact cache for each byte stored.

    `retried`: what it brought to compress it again, when this run did.
    `low`: whether it is less faithful than it should be, also where it was stored already.
    """

    id: str
    document: str
    tokens: int
    bytes: int
    ratio: float
    fidelity: float
    retried: Retry | None = None
    low: bool = False


@dataclass(frozen=True)
class Parts:
    """Of how many artifacts parts are measured, and ids of reused ones that could have some and have none."""

    measured: int
    unmeasured: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A run's summary. Tokens and bytes count each artifact once, computed and reused ones alike.

    Args:
        calibration: id of the one that the run compressed with, None without.
        parts: None where the run was not to measure any.
    """

    documents: int
    computed: int
    reused: int
    failed: int
    errors: tuple[DocumentError, ...]
    tokens: int
    bytes_full: int
    bytes_stored: int
    ratio: float
    seconds: float
    calibration: str | None
    artifacts: tuple[ArtifactLine, ...]
    parts: Parts | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; nothing is said of parts where none were to be measured."""
        fields = asdict(self)
        if self.parts is None:
            del fields["parts"]
        return fields

    @property
    def low_fidelity(self) -> tuple[ArtifactLine, ...]:
        """Artifacts whose answers may well be wrong."""
        return tuple(line for line in self.artifacts if line.low or line.fidelity < LOW_FIDELITY)

    @property
    def retried(self) -> tuple[ArtifactLine, ...]:
        """Artifacts that were compressed again because their fidelity was low."""
        return tuple(line for line in self.artifacts if line.retried is not None)

    @property
    def worst_fidelity(self) -> float | None:
        """Lowest top-1 agreement with the exact cache, 0 to 1; None without artifacts."""
        return min((line.fidelity for line in self.artifacts), default=None)

    @property
    def median_fidelity(self) -> float | None:
        """Median top-1 agreement with the exact cache, 0 to 1; None without artifacts."""
        return statistics.median(line.fidelity for line in self.artifacts) if self.artifacts else None


class Ledger:
    """Collects outcomes while a run goes on. Documents with the same tokens share one artifact."""

    def __init__(self) -> None:
        self._documents: dict[str, list[str]] = defaultdict(list)
        self._stored: dict[str, Stored] = {}
        self._computed: set[str] = set()
        self._failures: dict[str, str] = {}
        self._errors: list[DocumentError] = []
        self.total = 0

    def plan(self, artifact_id: str, document: DocumentRef) -> bool:
        """A document is to have this artifact. True when it is the first one that is."""
        self.total += 1
        self._documents[artifact_id].append(document.uri)
        return len(self._documents[artifact_id]) == 1

    def reject(self, uri: str, reason: str) -> None:
        """A document has no artifact."""
        self.total += 1
        self._errors.append(DocumentError(uri, reason))

    def fail(self, artifact_id: str, reason: str) -> None:
        """The documents of this artifact have none."""
        self._failures[artifact_id] = reason

    def store(self, stored: Stored, *, computed: bool) -> None:
        """The artifact is in the store: computed by this run, or found there."""
        self._stored[stored.artifact_id] = stored
        if computed:
            self._computed.add(stored.artifact_id)

    @property
    def settled(self) -> int:
        """Documents whose outcome is known."""
        known = [*self._stored, *self._failures]
        return len(self._errors) + sum(len(self._documents[artifact_id]) for artifact_id in known)

    @property
    def computed_tokens(self) -> int:
        """Tokens of the artifacts that this run computed."""
        return sum(self._stored[artifact_id].tokens for artifact_id in self._computed)

    @property
    def reused(self) -> tuple[str, ...]:
        """Ids in the store of the artifacts that this run found there."""
        return tuple(stored.own_id for key, stored in self._stored.items() if key not in self._computed)

    @property
    def measured(self) -> int:
        """How many artifacts this run measured parts of."""
        return sum(stored.parts for stored in self._stored.values())

    @property
    def ratio(self) -> float:
        """Bytes of the exact caches for each byte stored, 0 while there are none."""
        stored = sum(item.bytes_stored for item in self._stored.values())
        return sum(item.bytes_full for item in self._stored.values()) / stored if stored else 0.0

    def report(self, seconds: float, calibration: str | None = None, parts: Parts | None = None) -> Report:
        """The summary so far."""
        errors = list(self._errors)
        for artifact_id, reason in self._failures.items():
            errors += [DocumentError(uri, reason) for uri in self._documents[artifact_id]]
        lines = [_line(uri, stored) for key, stored in self._stored.items() for uri in self._documents[key]]
        return Report(
            documents=self.total,
            computed=len(self._computed),
            reused=len(lines) - len(self._computed),
            failed=len(errors),
            errors=tuple(sorted(errors, key=lambda error: error.document)),
            tokens=sum(item.tokens for item in self._stored.values()),
            bytes_full=sum(item.bytes_full for item in self._stored.values()),
            bytes_stored=sum(item.bytes_stored for item in self._stored.values()),
            ratio=round(self.ratio, 4),
            seconds=round(seconds, 3),
            calibration=calibration,
            artifacts=tuple(sorted(lines, key=lambda line: (line.document, line.id))),
            parts=parts,
        )


def _line(uri: str, stored: Stored) -> ArtifactLine:
    ratio = round(stored.bytes_full / stored.bytes_stored, 4)
    return ArtifactLine(
        stored.own_id,
        uri,
        stored.tokens,
        stored.bytes_stored,
        ratio,
        stored.fidelity,
        stored.retry,
        stored.low,
    )
