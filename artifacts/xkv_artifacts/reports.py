"""What the store answers: matches, and what was checked, rebuilt, collected and cleaned up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xkv_artifacts.manifest import PrefixManifest


@dataclass(frozen=True)
class Match:
    """A stored prefix of a prompt: the first `tokens` token ids of both are the same.

    Args:
        fidelity: of the artifact: top-1 agreement with the exact cache, 0 to 1. bytes: of its blob.
        manifest: of the artifact, where the lookup had to read it; None where it knew the token ids.
    """

    artifact_id: str
    tokens: int
    fidelity: float = field(default=0.0, compare=False)
    bytes: int = field(default=0, compare=False)
    manifest: PrefixManifest | None = field(default=None, compare=False, repr=False)

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
    calibrations that nobody goes on with, and stored tails that no server can find.
    """

    files: int
    bytes: int
    entries_dropped: int
    blobs_listed: int
    sums: int = 0
    tails: int = 0


@dataclass(frozen=True)
class Removal:
    """An artifact that was collected, of so many bytes, and why."""

    artifact_id: str
    namespace: str
    bytes: int
    reason: Literal["expired", "quota", "budget"]


@dataclass(frozen=True)
class Excess:
    """What a collection left beyond a limit, since the rest is pinned, in use or calibrations.

    Args:
        namespace: whose quota; None: the store's budget.
        bytes, artifacts: beyond it. pinned_bytes: of what is there.
        calibration_bytes: of the store's calibrations, which a budget counts and no collection deletes.
        untouched: nothing was deleted for it: what is pinned and the calibrations exceed it by themselves.
    """

    namespace: str | None
    bytes: int
    artifacts: int
    pinned_bytes: int
    calibration_bytes: int = 0
    untouched: bool = False


@dataclass(frozen=True)
class TailUsage:
    """So many stored tails of conversations, and the bytes of their blobs."""

    tails: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Collection:
    """What a collection removed (or would remove, in a dry run).

    Args:
        in_use: artifacts that stayed because they were read or computed at that moment.
        stored: bytes of all artifacts that are left, as the catalog counts them.
        excess: limits that are exceeded all the same.
        tails: of conversations, removed (or to be removed) since they had ended. No limit counts them.
    """

    removed: tuple[Removal, ...]
    in_use: int
    stored: int
    excess: tuple[Excess, ...]
    dry_run: bool = False
    tails: TailUsage = TailUsage()

    @property
    def bytes(self) -> int:
        """Removed in all."""
        return sum(removal.bytes for removal in self.removed)
