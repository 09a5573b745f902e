"""An artifact that is less faithful than it should be: how it is told, and how it is compressed again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from xkv_artifacts.manifest import Fidelity
from xkv_service.spec import CompressionSpec
from xkv_workers.report import LOW_FIDELITY

if TYPE_CHECKING:
    from xkv_service.calibration.calibration import Calibration

OnLow = Literal["retry", "keep", "fail"]


def retry_spec(spec: CompressionSpec) -> CompressionSpec:
    """Half the ratio, and the document's own bases. The spec has a ratio."""
    assert spec.ratio is not None
    return replace(spec.over("document"), ratio=max(1.0, spec.ratio / 2))


def is_low(
    fidelity: Fidelity, spec: CompressionSpec, calibration: Calibration | None, min_fidelity: float
) -> bool:
    """Whether answers from an artifact may well be wrong: it is further from the exact cache than documents
    of the calibration's sample were, or it agrees less than is asked for.

    Args:
        min_fidelity: 0 asks for nothing; without the calibration's thresholds `LOW_FIDELITY` is asked for.
    """
    thresholds = calibration is not None and calibration.figures.get("thresholds")
    if thresholds and calibration is not None and spec.ratio is not None:
        from xkv_service.calibration import certificates

        if certificates.is_low(fidelity, spec.ratio, calibration.figures):
            return True
        return fidelity.top1_agreement < min_fidelity
    return fidelity.top1_agreement < (min_fidelity or LOW_FIDELITY)
