"""The calibration of a run: the one asked for, the model's newest, or the one that comes with the model."""

from __future__ import annotations

from xkv_artifacts.calibration_format import CalibrationManifest, read_calibration
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.storage import load_calibration
from xkv_service.demo import demo_calibration_path
from xkv_service.errors import ModelMismatch
from xkv_workers.compression_options import CompressionOptions
from xkv_workers.inventory import resolve_calibration


def choose_calibration(
    store: ArtifactStore, model: ModelIdentity, options: CompressionOptions
) -> Calibration | None:
    """The calibration to compress with; None where there is none or none is wanted.

    Raises:
        ArtifactNotFound: the one asked for is not there, or its digits fit several.
        ModelMismatch: it is another model's.
        CorruptArtifact: it is damaged; it was moved to quarantine.
    """
    if not options.may_calibrate:
        return None
    if options.calibration == "auto":
        found = store.calibrations.newest(model.fingerprint) or _bundled(store, model.fingerprint)
        return None if found is None else load_calibration(store, found.id)
    wanted = resolve_calibration(store, options.calibration)
    check_model(store.calibrations.manifest(wanted), model)
    return load_calibration(store, wanted)


def check_model(manifest: CalibrationManifest, model: ModelIdentity) -> None:
    """See that a calibration is this model's.

    Raises:
        ModelMismatch: it is another's.
    """
    made = manifest.model
    if made.fingerprint != model.fingerprint:
        raise ModelMismatch(
            f"calibration {manifest.id[:12]} was made for {made.name} ({made.dtype}, "
            f"{made.fingerprint[:12]}), not for {model.name} ({model.dtype}, {model.fingerprint[:12]})",
            hint="weights, tokenizer and dtype must be the same: run `xkv calibrate` for this model",
        )


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
