"""What the store answers: matches, and what was checked, rebuilt and cleaned up."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Match:
    """A stored prefix of a prompt: the first `tokens` token ids of both are the same.

    Args:
        fidelity: of the artifact: top-1 agreement with the exact cache, 0 to 1. bytes: of its blob.
    """

    artifact_id: str
    tokens: int
    fidelity: float = field(default=0.0, compare=False)
    bytes: int = field(default=0, compare=False)

    @property
    def rank(self) -> tuple[int, float, int, str]:
        """Orders matches of one prompt, best last: most tokens, then closest to the exact cache."""
        return self.tokens, self.fidelity, self.bytes, self.artifact_id


@dataclass(frozen=True)
class Verification:
    """What re-reading one artifact or calibration gave; `fault` is None when every byte is as written."""

    artifact_id: str
    fault: str | None
    calibration: bool = False


@dataclass(frozen=True)
class Rebuild:
    """What a catalog was rebuilt from: what is listed again, and blobs that could not be."""

    artifacts: int
    faults: tuple[Verification, ...]
    calibrations: int = 0


@dataclass(frozen=True)
class Orphans:
    """What was cleaned up: files of dead writers, entries without a blob, blobs without an entry, sums of
    calibrations that nobody goes on with.
    """

    files: int
    bytes: int
    entries_dropped: int
    blobs_listed: int
    sums: int = 0
