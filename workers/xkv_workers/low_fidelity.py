"""Artifacts that are less faithful than they should be: how they are told, and what is tried instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from xkv_artifacts.manifest import Fidelity
from xkv_service.calibration.limits import fidelity_limit
from xkv_service.spec import CompressionSpec
from xkv_workers.messages import Stored
from xkv_workers.report import LOW_FIDELITY

if TYPE_CHECKING:
    from xkv_service.calibration.calibration import Calibration

OnLow = Literal["retry", "keep", "fail"]


def retry_specs(spec: CompressionSpec) -> tuple[CompressionSpec, ...]:
    """What is tried for a document that `spec`, which has a ratio, does not suit.

    Half the ratio, with bases of its own, and with a calibration's bases and mixed bits, where there is one.
    """
    assert spec.ratio is not None
    half = replace(spec.over("document"), ratio=max(1.0, spec.ratio / 2))
    if spec.calibration is None:
        return (half,)
    return half, replace(half.over("calibrated"), factor_dtype="mixed")


@dataclass(frozen=True)
class Standard:
    """How faithful the artifacts of a run must be, those that are stored already included.

    Args:
        action: what is done about artifacts of low fidelity.
        min_fidelity: top-1 agreement asked for; 0 asks for nothing.
        calibration: whose thresholds say what is low; without any `LOW_FIDELITY` is asked for.
    """

    action: OnLow = "keep"
    min_fidelity: float = 0.0
    calibration: Calibration | None = None

    def is_low(self, fidelity: Fidelity, ratio: float | None) -> bool:
        """Whether answers from an artifact may well be wrong.

        It is further from the exact cache than documents of the calibration's sample were, or than answers
        survive, or it agrees less than is asked for.

        Args:
            ratio: that the artifact was made for, None where ranks were given.
        """
        limit = None if self.calibration is None else fidelity_limit(ratio, self.calibration.figures)
        if limit is None:
            return fidelity.top1_agreement < (self.min_fidelity or LOW_FIDELITY)
        return fidelity.top1_agreement < self.min_fidelity or fidelity.kl > limit

    def shortfall(self, stored: Stored) -> str | None:
        """Why an artifact that is stored already cannot be used, in one line; None when it can."""
        found = f"stored already with fidelity {stored.fidelity:.3f}"
        if stored.fidelity < self.min_fidelity:
            wanted = f"below {self.min_fidelity:g}"
            return f"{found}, {wanted}: lower --min-fidelity, or compress with a lower --ratio"
        if stored.low and self.action == "fail":
            return f"{found} (KL {stored.kl:.4f}), which is low: lower --ratio, or --on-low-fidelity retry"
        return None
