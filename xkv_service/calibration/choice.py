"""Which bases and bits a ratio is best served by, as the calibration's validation found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.steps import STEPS, best_step
from xkv_service.spec import CompressionSpec


def calibrated_spec(ratio: float, calibration: Calibration, **fields: Any) -> CompressionSpec:
    """The spec of a prefix compressed with a calibration: shared bases, mixed bits, or as `fields` say.

    Layers that the calibration found to need no index have none, where the spec lets them.
    """
    basis = fields.pop("basis", "calibrated")
    chosen = {"factor_dtype": "mixed", "index": "derived", **fields}
    if chosen["index"] != "none" and not chosen.get("outlier_chunks"):
        chosen.setdefault("reuse", reuse_of(calibration))
    return CompressionSpec(ratio=ratio, calibration=calibration.id, **chosen).over(basis)


def reuse_of(calibration: Calibration) -> tuple[int, ...]:
    """Layers that attend to what the layer before them chose; none where that was not measured."""
    selection = calibration.figures.get("selection")
    found = selection.get("reuse") if isinstance(selection, Mapping) else None
    return tuple(found) if isinstance(found, list | tuple) else ()


def best_spec(ratio: float, calibration: Calibration) -> CompressionSpec:
    """The spec that validation speaks for (`best_step`) at the ratio tried next to `ratio`.

    Without validation: shared bases and mixed bits.
    """
    rows = [
        row
        for row in calibration.figures.get("validation", ())
        if row["step"] in STEPS and row.get("kl") is not None
    ]
    if not rows:
        return calibrated_spec(ratio, calibration)
    near = min({row["asked"] for row in rows}, key=lambda asked: (abs(asked - ratio), -asked))
    tried = [row for row in rows if row["asked"] == near]
    most = max(row.get("documents", 0) for row in tried)  # others were too short for some step
    whole = [row for row in tried if row.get("documents", 0) == most]
    errors = {row["step"]: row.get("kl_error") or 0.0 for row in whole}
    best = best_step({row["step"]: row["kl"] for row in whole}, errors)
    return calibrated_spec(ratio, calibration, **STEPS[best])
