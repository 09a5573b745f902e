"""What a calibration can make of a ratio, and which of it to take: names, settings, the choice."""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot

SHARED = "calibrated bases, bits"
STEPS: Mapping[str, Mapping[str, str]] = {
    "ranks and weights": {"basis": "document", "factor_dtype": "int8"},
    "bits": {"basis": "document", "factor_dtype": "mixed"},
    "calibrated bases": {"basis": "calibrated", "factor_dtype": "int8"},
    "calibrated bases, 4 bits": {"basis": "calibrated", "factor_dtype": "int4"},
    SHARED: {"basis": "calibrated", "factor_dtype": "mixed"},
}
"""Basis and bits, by the name that the step has in `figures["validation"]`."""

NEGLIGIBLE = 1e-3
"""Nats at which nothing is at stake between steps: answers are lost at 0.02 and above (docs/defaults.md)."""


def best_step(divergence: Mapping[str, float], errors: Mapping[str, float] | None = None) -> str:
    """The step to take.

    Shared bases and mixed bits serve short documents too and cost no factorization: another step is taken
    only where it is better by something that matters, and by more than two standard errors.

    Args:
        divergence: mean divergence of the steps that were measured, nats. errors: their standard errors.
    """
    best = min(divergence, key=lambda step: divergence[step])
    if SHARED not in divergence:
        return best
    known = errors or {}
    margin = max(NEGLIGIBLE, 2 * hypot(known.get(SHARED, 0.0), known.get(best, 0.0)))
    return SHARED if divergence[SHARED] - divergence[best] <= margin else best
