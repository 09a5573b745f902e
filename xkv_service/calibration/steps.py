"""What a calibration can make of a ratio, and which of it to take: names, settings, the choice."""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot

from xkv_service.calibration.limits import ERRORS, NEGLIGIBLE

SHARED = "calibrated bases, bits"
STEPS: Mapping[str, Mapping[str, str]] = {
    "ranks and weights": {"basis": "document", "factor_dtype": "int8"},
    "bits": {"basis": "document", "factor_dtype": "mixed"},
    "calibrated bases": {"basis": "calibrated", "factor_dtype": "int8"},
    "calibrated bases, 4 bits": {"basis": "calibrated", "factor_dtype": "int4"},
    SHARED: {"basis": "calibrated", "factor_dtype": "mixed"},
}
"""Basis and bits, by the name that the step has in `figures["validation"]`."""


def margin(*errors: float) -> float:
    """How far two means must be apart to be called different.

    Args:
        errors: their standard errors, taken as independent.
    """
    return ERRORS * hypot(*errors)


def best_step(divergence: Mapping[str, float], errors: Mapping[str, float] | None = None) -> str:
    """The step to take.

    Shared bases and mixed bits serve short documents too and cost no factorization: another step is taken
    only where it is better by something that matters, and by more than `margin`.

    Args:
        divergence: mean divergence of the steps that were measured, nats. errors: their standard errors.
    """
    best = min(divergence, key=lambda step: divergence[step])
    if SHARED not in divergence:
        return best
    known = errors or {}
    least = max(NEGLIGIBLE, margin(known.get(SHARED, 0.0), known.get(best, 0.0)))
    return SHARED if divergence[SHARED] - divergence[best] <= least else best
