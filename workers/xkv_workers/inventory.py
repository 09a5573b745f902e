"""What is in a store, for people: artifacts and calibrations by short ids, and everything known about one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from xkv_artifacts.calibration_format import CalibrationManifest
from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, UnsupportedFormat
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_workers.errors import CalibrationNeeded
from xkv_workers.verdicts import Verdict, Verdicts

_SHORTEST = 4


@dataclass(frozen=True)
class Description:
    """One artifact: its catalog entry, the manifest in its blob, and what that says of its fidelity."""

    entry: Entry | None
    manifest: PrefixManifest
    bytes: int
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values. Tensors are left out: there are hundreds."""
        fields = self.manifest.model_dump(mode="json", exclude={"tensors"})
        fields["bytes"] = self.bytes
        fields["low"], fields["kl_limit"] = self.verdict.low, self.verdict.limit
        fields["ratio"] = round(self.manifest.bytes_full / self.bytes, 4)
        fields["last_used"] = self.entry.last_used if self.entry else None
        fields["pinned"] = self.entry.pinned if self.entry else None
        fields["expires"] = self.entry.expires if self.entry else None
        return fields


@dataclass(frozen=True)
class CalibrationDescription:
    """One calibration: the manifest in its blob."""

    manifest: CalibrationManifest
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values. Tensors are left out, and of the figures those that are lists or objects."""
        fields = self.manifest.model_dump(mode="json", exclude={"tensors"})
        fields["figures"] = self.figures
        fields["bytes"] = self.bytes
        return fields

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that are one value each."""
        figures = self.manifest.figures
        return {name: value for name, value in figures.items() if not isinstance(value, list | dict)}


def resolve(store: ArtifactStore, start: str) -> str:
    """The one artifact id that begins with `start`.

    Raises:
        ArtifactNotFound: none does, several do, or it is too short or no id at all.
    """
    return _resolve(start, lambda: _artifact_ids(store), "artifact", "xkv ls")


def resolve_calibration(store: ArtifactStore, start: str) -> str:
    """The one calibration id that begins with `start`. Raises as `resolve`."""
    return _resolve(start, store.calibrations.ids, "calibration", "xkv calibrations ls")


def resolve_any(store: ArtifactStore, start: str) -> str:
    """The one id of an artifact or a calibration that begins with `start`. Raises as `resolve`."""
    return _resolve(start, lambda: [*_artifact_ids(store), *store.calibrations.ids()], "artifact", "xkv ls")


def describe(store: ArtifactStore, artifact_id: str) -> Description:
    """Everything known about an artifact, from its blob.

    Raises:
        ArtifactNotFound, CorruptArtifact, UnsupportedFormat
    """
    manifest = store.manifest(artifact_id)
    verdict = Verdicts(store).of(manifest)
    return Description(store.get(artifact_id), manifest, store.blobs.size(artifact_id), verdict)


def describe_calibration(store: ArtifactStore, calibration_id: str) -> CalibrationDescription:
    """Everything known about a calibration, from its blob. Raises as `describe`."""
    manifest = store.calibrations.manifest(calibration_id)
    return CalibrationDescription(manifest, store.calibrations.blobs.size(calibration_id))


def refuse_needed(store: ArtifactStore, calibration_id: str) -> None:
    """See that no artifact in the store has the calibration's bases; each one's header is read.

    Raises:
        CalibrationNeeded: some have, with their count.
        CatalogUnavailable, StoreError
    """
    count = sum(_needs(store, artifact_id, calibration_id) for artifact_id in store.blobs.ids())
    if count:
        several = count > 1
        raise CalibrationNeeded(
            f"calibration {calibration_id[:12]}: {count:,} stored artifact{'s' * several} cannot be used"
            " without it",
            hint=f"remove {'them' if several else 'it'} first (`xkv rm`), or give --force",
        )


def _needs(store: ArtifactStore, artifact_id: str, calibration_id: str) -> bool:
    try:
        spec = store.manifest(artifact_id).spec
    except (ArtifactNotFound, CorruptArtifact, UnsupportedFormat):
        return False
    return (spec.get("basis"), spec.get("calibration")) == ("calibrated", calibration_id)


def _artifact_ids(store: ArtifactStore) -> list[str]:
    return [*store.catalog.ids(), *store.blobs.ids()]


def _resolve(start: str, ids: Callable[[], Iterable[str]], noun: str, command: str) -> str:
    if is_artifact_id(start):
        return start
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},63}}", start):
        article = "an" if noun == "artifact" else "a"
        raise ArtifactNotFound(
            f"{start[:80]!r} is not {article} {noun} id",
            hint=f"give {_SHORTEST} or more of its first hex digits; `{command}` lists ids",
        )
    found = sorted({found for found in ids() if found.startswith(start)})
    if not found:
        raise ArtifactNotFound(f"no {noun} begins with {start}", hint=f"`{command}` lists them")
    if len(found) > 1:
        shown = ", ".join(identity[: len(start) + 4] for identity in found[:5])
        raise ArtifactNotFound(f"{len(found)} {noun}s begin with {start}", hint=f"give more digits: {shown}")
    return found[0]
