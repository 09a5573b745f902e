"""What is in a store, for people: artifacts by short ids, and everything known about one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import ArtifactNotFound
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore

_SHORTEST = 4


@dataclass(frozen=True)
class Description:
    """One artifact: its catalog entry, and the manifest in its blob."""

    entry: Entry | None
    manifest: PrefixManifest
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values. Tensors are left out: there are hundreds."""
        fields = self.manifest.model_dump(mode="json", exclude={"tensors"})
        fields["bytes"] = self.bytes
        fields["ratio"] = round(self.manifest.bytes_full / self.bytes, 4)
        fields["last_used"] = self.entry.last_used if self.entry else None
        return fields


def resolve(store: ArtifactStore, start: str) -> str:
    """The one artifact id that begins with `start`.

    Raises:
        ArtifactNotFound: none does, several do, or it is too short or no id at all.
    """
    if is_artifact_id(start):
        return start
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},63}}", start):
        raise ArtifactNotFound(
            f"{start[:80]!r} is not an artifact id",
            hint=f"give {_SHORTEST} or more of its first hex digits; `xkv ls` lists ids",
        )
    found = sorted({*_starting(store.catalog.ids(), start), *_starting(store.blobs.ids(), start)})
    if not found:
        raise ArtifactNotFound(f"no artifact begins with {start}", hint="`xkv ls` lists them")
    if len(found) > 1:
        shown = ", ".join(artifact_id[: len(start) + 4] for artifact_id in found[:5])
        raise ArtifactNotFound(
            f"{len(found)} artifacts begin with {start}", hint=f"give more digits: {shown}"
        )
    return found[0]


def describe(store: ArtifactStore, artifact_id: str) -> Description:
    """Everything known about an artifact, from its blob.

    Raises:
        ArtifactNotFound, CorruptArtifact, UnsupportedFormat
    """
    manifest = store.manifest(artifact_id)
    return Description(store.get(artifact_id), manifest, store.blobs.size(artifact_id))


def _starting(ids: Iterable[str], start: str) -> list[str]:
    return [artifact_id for artifact_id in ids if artifact_id.startswith(start)]
