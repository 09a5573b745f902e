"""Calibrations to and from a store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from xkv_artifacts.blobs import store_errors
from xkv_artifacts.calibration_format import (
    CalibrationManifest,
    CalibrationSample,
    identified,
    is_statistic,
    read_calibration,
    write_calibration,
)
from xkv_artifacts.keys import sample_sha256
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.figure_checks import check_figures
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.statistics import DOCUMENTS, Statistics, documents_of
from xkv_service.errors import InvalidSpec, ModelMismatch
from xkv_service.modeling.layout import LayerLayout


def save_calibration(
    store: ArtifactStore,
    calibration: Calibration,
    model: ModelIdentity,
    sample: Sequence[ProbedPrefix],
    statistics: Statistics | None = None,
) -> CalibrationManifest:
    """Publish a calibration; its id comes from its content.

    Args:
        sample: the documents that it was made from and tried on.
        statistics: kept with it, for later calibrations to go on from.

    Raises:
        StoreError, CatalogUnavailable
    """
    manifest = calibration_manifest(calibration, model, sample)
    kept = {} if statistics is None else statistics.to_tensors()
    return store.calibrations.publish(manifest, {**calibration.to_tensors(), **kept})


def calibration_manifest(
    calibration: Calibration, model: ModelIdentity, sample: Sequence[ProbedPrefix]
) -> CalibrationManifest:
    """What a calibration's file says about it.

    Args:
        sample: the documents that it was made from and tried on.
    """
    return CalibrationManifest(
        model=model,
        sample=CalibrationSample(
            documents=len(sample),
            tokens=sum(len(one.token_ids) for one in sample),
            sha256=sample_sha256([one.token_ids for one in sample]),
        ),
        settings=calibration.figures.get("settings", {}),
        groups=tuple(group.layers for group in calibration.groups),
        figures=_finite(dict(calibration.figures)),
        created=datetime.now(timezone.utc),
    )


def _finite(value: Any) -> Any:
    """The value with None for what JSON has no number for: the divergence of predictions that are none."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_calibration_file(path: Path, manifest: CalibrationManifest, calibration: Calibration) -> None:
    """Write a calibration to a file of its own, outside a store."""
    tensors = calibration.to_tensors()
    ready = identified(manifest, tensors)
    with path.open("wb") as file:
        write_calibration(file, ready, tensors)


def read_calibration_file(path: Path) -> Calibration:
    """A calibration from a file, every byte checked. Raises as `read_identified`."""
    return read_identified(path)[1]


def read_identified(path: Path) -> tuple[ModelIdentity, Calibration]:
    """A calibration from a file, every byte checked, and the model it is of.

    Raises:
        StoreError: it cannot be read. CorruptArtifact, UnsupportedFormat: it is no calibration.
    """
    with store_errors("read", str(path)), path.open("rb") as file:
        manifest, tensors = read_calibration(file)
    check_figures(manifest.id, manifest.figures)
    made = Calibration.from_tensors(manifest.groups, tensors, manifest.figures, manifest.id)
    return manifest.model, made


def load_calibration(
    store: ArtifactStore, calibration_id: str, fingerprint: str | None = None
) -> Calibration:
    """A stored calibration, every byte checked.

    Args:
        fingerprint: of the model that it must be of, if that matters.

    Raises:
        ArtifactNotFound, CorruptArtifact, UnsupportedFormat, StoreError
        ModelMismatch: it is another model's.
    """
    manifest, tensors = store.calibrations.load(calibration_id)
    if fingerprint not in (None, manifest.model.fingerprint):
        raise ModelMismatch(
            f"calibration {calibration_id[:12]} is of another model: {manifest.model.name} "
            f"({manifest.model.architecture})",
            hint="compress the document again",
        )
    check_figures(manifest.id, manifest.figures)
    return Calibration.from_tensors(manifest.groups, tensors, manifest.figures, manifest.id)


def check_made_for(calibration_id: str, made: ModelIdentity, model: ModelIdentity) -> None:
    """See that a calibration is a model's.

    Args:
        made: the model that it was made for.

    Raises:
        ModelMismatch: it is another one; the message says what of it is another, where both say.
    """
    if made.fingerprint != model.fingerprint:
        differs = made.differs_from(model)
        raise ModelMismatch(
            f"calibration {calibration_id[:12]} was made for {made.name} ({made.dtype}, "
            f"{made.fingerprint[:12]}), not for {model.name} ({model.dtype}, {model.fingerprint[:12]})"
            + (f": it is of {differs}" if differs else ""),
            hint="weights, tokenizer, config and dtype must be the same: run `xkv calibrate` for this model",
        )


def known_documents(store: ArtifactStore, calibration_id: str) -> frozenset[str]:
    """`document_digest` of each document that a stored calibration keeps sums of.

    Raises:
        InvalidSpec: it keeps none. As `load_calibration`.
    """
    known = documents_of(store.calibrations.load(calibration_id, DOCUMENTS.__eq__)[1])
    if not known:
        raise InvalidSpec(
            f"calibration {calibration_id[:12]} keeps no sums to go on from",
            hint="it was made before they were kept, or they were too large: calibrate without --from",
        )
    return known


def load_statistics(
    store: ArtifactStore,
    calibration_id: str,
    layers: Sequence[LayerLayout],
    reach: int,
    device: torch.device,
) -> Statistics:
    """What a stored calibration keeps of its sample. Arguments and errors as `Statistics.from_tensors`."""
    calibration = load_calibration(store, calibration_id)
    _, tensors = store.calibrations.load(calibration_id, is_statistic)
    return Statistics.from_tensors(tensors, calibration, layers, reach, device)
