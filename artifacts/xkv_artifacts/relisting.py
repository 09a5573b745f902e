"""Making a catalog agree with the blobs, which are the truth."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from xkv_artifacts.blobs import CALIBRATIONS, BlobStore
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, UnsupportedFormat
from xkv_artifacts.reports import Verification

ListBlob = Callable[[str], object]


class Listed(Protocol):
    """The entries of a catalog."""

    def ids(self) -> list[str]:
        """The ids of all entries."""

    def drop(self, artifact_id: str, /) -> bool:
        """Forget one; False when it was not known."""


def list_all(blobs: BlobStore, list_blob: ListBlob) -> tuple[int, tuple[Verification, ...]]:
    """List every blob that can be read: how many those are, and what is wrong with the others.

    Raises:
        CatalogUnavailable, StoreError
    """
    calibration = blobs.folder == CALIBRATIONS
    faults = []
    count = 0
    for artifact_id in blobs.ids():
        try:
            list_blob(artifact_id)
            count += 1
        except (CorruptArtifact, UnsupportedFormat) as error:
            faults.append(Verification(artifact_id, error.message, calibration))
        except ArtifactNotFound:
            continue  # removed meanwhile
    return count, tuple(faults)


def list_orphans(
    blobs: BlobStore,
    catalog: Listed,
    list_blob: ListBlob,
    on_missing: Callable[[str], bool] = lambda artifact_id: False,
) -> tuple[int, int]:
    """Drop entries without a blob and list blobs without an entry: how many of each.

    Args:
        on_missing: told of each entry without a blob first; whether it has dropped it.

    Raises:
        CatalogUnavailable, StoreError
    """
    listed = set(catalog.ids())
    stored = set(blobs.ids())
    lost = sorted(listed - stored)
    dropped = sum(on_missing(artifact_id) or catalog.drop(artifact_id) for artifact_id in lost)
    found = 0
    for artifact_id in sorted(stored - listed):
        with suppress(CorruptArtifact, ArtifactNotFound, UnsupportedFormat):
            list_blob(artifact_id)
            found += 1
    return dropped, found
