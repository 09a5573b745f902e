"""The calibration of a run: the one asked for, the model's newest, or the one that comes with the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from xkv_artifacts.calibration_format import CalibrationManifest, read_calibration
from xkv_artifacts.errors import XKVError
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.storage import check_made_for, load_calibration
from xkv_service.demo import demo_calibration_path
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.inventory import resolve_calibration

_log = logging.getLogger(__name__)


def choose_calibration(
    store: ArtifactStore, model: ModelIdentity, options: CompressionOptions
) -> Calibration | None:
    """The calibration to compress with; None where there is none or none is wanted. Newer ones whose headers
    cannot be read are skipped, and the log says so.

    Raises:
        ArtifactNotFound: the one asked for is not there, or its digits fit several.
        ModelMismatch: it is another model's.
        CorruptArtifact: it is damaged; it was moved to quarantine.
    """
    if not options.may_calibrate:
        return None
    if options.calibration == "auto":
        faults: list[XKVError] = []
        found = newest_or_bundled(store, model.fingerprint, faults.append)
        if faults:
            _log.warning("%s", _skipped(faults, found))
        return None if found is None else load_calibration(store, found.id)
    wanted = resolve_calibration(store, options.calibration)
    check_made_for(wanted, store.calibrations.manifest(wanted).model, model)
    return load_calibration(store, wanted)


def newest_or_bundled(
    store: ArtifactStore, fingerprint: str, on_fault: Callable[[XKVError], None] | None = None
) -> CalibrationManifest | None:
    """The calibration that "auto" takes; None where there is none.

    Args:
        on_fault: told of each that is skipped since it cannot be read.

    Raises:
        CatalogUnavailable, StoreError
    """
    return store.calibrations.newest(fingerprint, on_fault) or _bundled(store, fingerprint)


def _skipped(faults: Sequence[XKVError], used: CalibrationManifest | None) -> str:
    """What was left out and why, what is used instead, and what to do, in one line."""
    why = "; ".join(f"skipped {fault.message}" for fault in faults)
    instead = "none" if used is None else f"calibration {used.id[:12]} of {used.created:%d %B %Y}"
    return f"{why}. Used instead: {instead}. Run `xkv calibrate` again, or give --calibration ID or none."


def _bundled(store: ArtifactStore, fingerprint: str) -> CalibrationManifest | None:
    """Publish the bundled model's own calibration, if this is the bundled model."""
    path = demo_calibration_path()
    if not path.exists():
        return None
    with path.open("rb") as file:
        manifest, tensors = read_calibration(file)
    if manifest.model.fingerprint != fingerprint:
        return None
    return store.calibrations.publish(manifest, tensors)
