"""By which limits a calibration calls something better, enough or low. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ERRORS = 2
"""Standard errors of a difference beyond which one thing is called better than another."""
LOST = 0.02
"""Nats from where on answers are lost (docs/defaults.md)."""
NEGLIGIBLE = 1e-3
"""Nats at which nothing is at stake between steps."""
ENOUGH = 0.98
"""Of what a left-out document's own directions hold; below, more documents would give other bases."""
LEAST_HELD = 3
"""Documents held out below which the figures of a calibration are of too few."""
LEAST_PARTS = 4
"""Parts of a sample below which its draws hardly differ: two parts have three draws, and look too sure."""
LEAST_AGAIN = 0.5
"""Share of draws in which the same metric should be chosen: below, it more often is another one."""
TIMES_WORST = 3.0
"""Times the worst divergence among the documents held out: what lies above is not like them."""
LEAST_KL = 0.01
"""Nats below which no fidelity is called low; above `LOST` every one is."""


def fidelity_limit(ratio: float | None, figures: Mapping[str, Any]) -> float | None:
    """Divergence (nats) above which an artifact is less faithful than documents of the calibration's sample
    are at its ratio, or so little that answers are lost; None where nothing says.

    Args:
        ratio: that the artifact was made for, None where ranks were given.
        figures: the calibration's, checked; without thresholds there is no limit. Those of before may be
            above `LOST`.
    """
    known: list[tuple[float, float]] = sorted(
        (one["ratio"], one["kl"]) for one in figures.get("thresholds", ())
    )
    if ratio is None or not known:
        return None
    return min(LOST, next((kl for at, kl in known if at >= ratio), known[-1][1]))
