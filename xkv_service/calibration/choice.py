"""Which bases and bits a ratio is best served by, as the calibration's validation found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xkv_service.calibration.calibration import Calibration
from xkv_service.spec import CompressionSpec

STEPS: Mapping[str, Mapping[str, str]] = {
    "ranks and weights": {"basis": "document", "factor_dtype": "int8"},
    "bits": {"basis": "document", "factor_dtype": "mixed"},
    "calibrated bases": {"basis": "calibrated", "factor_dtype": "int8"},
    "calibrated bases, 4 bits": {"basis": "calibrated", "factor_dtype": "int4"},
    "calibrated bases, bits": {"basis": "calibrated", "factor_dtype": "mixed"},
}
"""What a calibration can make of a ratio, by the name it has in `figures["validation"]`."""


def calibrated_spec(ratio: float, calibration: Calibration, **fields: Any) -> CompressionSpec:
    """The spec of a prefix compressed with a calibration: shared bases, mixed bits, or as `fields` say."""
    chosen = {"basis": "calibrated", "factor_dtype": "mixed", "index": "derived", **fields}
    return CompressionSpec(ratio=ratio, calibration=calibration.id, **chosen)


def best_spec(ratio: float, calibration: Calibration) -> CompressionSpec:
    """The spec whose divergence was least at the validated ratio next to `ratio`, the higher one of two.

    Without validation: shared bases and mixed bits.
    """
    rows = [row for row in calibration.figures.get("validation", ()) if row["step"] in STEPS and "kl" in row]
    if not rows:
        return calibrated_spec(ratio, calibration)
    near = min({row["asked"] for row in rows}, key=lambda asked: (abs(asked - ratio), -asked))
    best = min((row for row in rows if row["asked"] == near), key=lambda row: row["kl"])
    return calibrated_spec(ratio, calibration, **STEPS[best["step"]])
