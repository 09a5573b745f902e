"""`CalibrationShelf`: a store's calibrations. The blobs are the truth; the catalog finds them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from xkv_artifacts import calibration_format
from xkv_artifacts.blobs import CALIBRATIONS, BlobStore
from xkv_artifacts.calibration_entry import CalibrationEntry
from xkv_artifacts.calibration_format import CalibrationManifest
from xkv_artifacts.checked_blobs import CheckedBlobs, of_id
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    CorruptArtifact,
    UnsupportedFormat,
    XKVError,
)
from xkv_artifacts.listing import Listing
from xkv_artifacts.relisting import list_all, list_orphans
from xkv_artifacts.reports import Verification

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


def _log_fault(fault: XKVError) -> None:
    _log.warning("%s", fault.message)


class CalibrationShelf:
    """The calibrations of one store.

    Args:
        blobs: the store's blobs, of whatever folder.
        catalog: its list of calibrations.
    """

    def __init__(self, blobs: BlobStore, catalog: Listing[CalibrationEntry]) -> None:
        self.blobs = blobs.of(CALIBRATIONS)
        self.catalog = catalog
        self._checked = CheckedBlobs(
            self.blobs, self._forget, noun="calibration", hint="run xkv calibrate again"
        )

    def publish(
        self, manifest: CalibrationManifest, tensors: Mapping[str, torch.Tensor]
    ) -> CalibrationManifest:
        """Write a calibration's blob, then list it in the catalog.

        Args:
            manifest: its id and `tensors` are filled in here.

        Returns:
            The manifest as written.

        Raises:
            CorruptArtifact: manifest and tensors do not fit together; nothing is written.
            StoreError: the blob could not be written; nothing is left behind.
            CatalogUnavailable: the blob is there, but not listed; `xkv gc --orphans` lists it.
        """
        ready = calibration_format.identified(manifest, tensors)
        written = self.blobs.put(
            ready.id, lambda file: calibration_format.write_calibration(file, ready, tensors)
        )
        self._list(written)
        return written

    def load(
        self, calibration_id: str, wanted: Callable[[str], bool] = calibration_format.is_no_statistic
    ) -> tuple[CalibrationManifest, dict[str, torch.Tensor]]:
        """Read a calibration's tensors, every byte of them checked.

        Args:
            wanted: whether a tensor of this name is read; by default statistics are not.

        Raises:
            ArtifactNotFound: there is no such blob.
            CorruptArtifact: the blob is bad; it was moved to quarantine and its entry dropped.
            UnsupportedFormat: another version wrote it.
            StoreError
        """

        def read(file: BinaryIO) -> tuple[CalibrationManifest, dict[str, torch.Tensor]]:
            manifest, tensors = calibration_format.read_calibration(file, wanted)
            return of_id(calibration_id, manifest), tensors

        return self._checked.read(calibration_id, read)

    def manifest(self, calibration_id: str) -> CalibrationManifest:
        """A calibration's manifest, from the blob's own header. Raises as `load`."""
        return self._checked.read(
            calibration_id, lambda file: of_id(calibration_id, calibration_format.read_manifest(file))
        )

    def entries(
        self, fingerprint: str | None = None, on_fault: Callable[[CatalogError], None] | None = None
    ) -> list[CalibrationEntry]:
        """What the catalog lists, of one model or of all, newest first.

        Args:
            on_fault: told of each damaged entry; such entries are left out.
        """
        found = self.catalog.entries(on_fault)
        return [entry for entry in found if fingerprint in (None, entry.fingerprint)]

    def newest(
        self, fingerprint: str, on_fault: Callable[[XKVError], None] | None = None
    ) -> CalibrationManifest | None:
        """The model's newest calibration that can be read, or None. The catalog names candidates; what their
        blobs say counts.

        Args:
            on_fault: told of each entry or blob that is skipped because it is damaged, or of another version.

        Raises:
            CatalogUnavailable, StoreError
        """
        told = on_fault or _log_fault
        found = [
            manifest
            for entry in self.entries(fingerprint, told)
            if (manifest := self._candidate(entry.id, told)) is not None
        ]
        own = [manifest for manifest in found if manifest.model.fingerprint == fingerprint]
        return max(own, key=lambda manifest: (manifest.created, manifest.id), default=None)

    def ids(self) -> list[str]:
        """The ids of all that are stored or listed.

        Raises:
            CatalogUnavailable, StoreError
        """
        return sorted({*self.blobs.ids(), *self.catalog.ids()})

    def fault(self, calibration_id: str) -> str | None:
        """Re-read every byte; what is wrong, or None. Nothing is moved. Raises StoreError."""
        return self._checked.fault(calibration_id, calibration_format.verify)

    def remove(self, calibration_id: str) -> bool:
        """Delete a calibration, its entry first; False when there was none.

        Raises:
            CatalogUnavailable, StoreError
        """
        listed = self.catalog.drop(calibration_id)
        return self.blobs.remove(calibration_id) or listed

    def list_all(self) -> tuple[int, tuple[Verification, ...]]:
        """List every blob by what its header says: how many could be, and what is wrong with the others."""
        return list_all(self.blobs, self._list_blob)

    def list_orphans(self) -> tuple[int, int]:
        """Drop entries without a blob and list blobs without an entry: how many of each."""
        return list_orphans(self.blobs, self.catalog, self._list_blob)

    def _list_blob(self, calibration_id: str) -> None:
        self._list(self.manifest(calibration_id))

    def _list(self, manifest: CalibrationManifest) -> None:
        size = self.blobs.size(manifest.id)
        self.catalog.put(CalibrationEntry.of_manifest(manifest, size=size))

    def _candidate(
        self, calibration_id: str, on_fault: Callable[[XKVError], None]
    ) -> CalibrationManifest | None:
        try:
            return self.manifest(calibration_id)
        except ArtifactNotFound:
            self.catalog.drop(calibration_id)
        except (CorruptArtifact, UnsupportedFormat) as error:
            on_fault(error)
        return None

    def _forget(self, calibration_id: str) -> None:
        with suppress(CatalogUnavailable, CatalogError):
            self.catalog.drop(calibration_id, patience_s=0)
