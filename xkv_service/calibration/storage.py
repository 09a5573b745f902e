"""Calibrations to and from a store."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from xkv_artifacts.calibration_format import CalibrationManifest, CalibrationSample
from xkv_artifacts.keys import sample_sha256
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.probes import ProbedPrefix


def save_calibration(
    store: ArtifactStore, calibration: Calibration, model: ModelIdentity, sample: Sequence[ProbedPrefix]
) -> CalibrationManifest:
    """Publish a calibration; its id comes from its content.

    Args:
        sample: the documents that it was made from and tried on.

    Raises:
        StoreError, CatalogUnavailable
    """
    manifest = CalibrationManifest(
        model=model,
        sample=CalibrationSample(
            documents=len(sample),
            tokens=sum(len(one.token_ids) for one in sample),
            sha256=sample_sha256([one.token_ids for one in sample]),
        ),
        settings=dict(calibration.figures.get("settings", {})),
        groups=tuple(group.layers for group in calibration.groups),
        figures=dict(calibration.figures),
        created=datetime.now(timezone.utc),
    )
    return store.calibrations.publish(manifest, calibration.to_tensors())


def load_calibration(store: ArtifactStore, calibration_id: str) -> Calibration:
    """A stored calibration, every byte checked.

    Raises:
        ArtifactNotFound, CorruptArtifact, UnsupportedFormat, StoreError
    """
    manifest, tensors = store.calibrations.load(calibration_id)
    return Calibration.from_tensors(manifest.groups, tensors, manifest.figures, manifest.id)
