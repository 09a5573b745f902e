"""What the store answers: matches, and what was checked, rebuilt and cleaned up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    """A stored prefix of a prompt: the first `tokens` token ids of both are the same."""

    artifact_id: str
    tokens: int


@dataclass(frozen=True)
class Verification:
    """What re-reading one artifact gave; `fault` is None when every byte is as written."""

    artifact_id: str
    fault: str | None


@dataclass(frozen=True)
class Rebuild:
    """What a catalog was rebuilt from: artifacts listed again, and blobs that could not be."""

    artifacts: int
    faults: tuple[Verification, ...]


@dataclass(frozen=True)
class Orphans:
    """What was cleaned up: files of dead writers, entries without a blob, blobs without an entry."""

    files: int
    bytes: int
    entries_dropped: int
    blobs_listed: int
