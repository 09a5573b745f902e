"""By which limits a calibration calls something better, enough or low. Imports nothing heavy."""

from __future__ import annotations

ERRORS = 2
"""Standard errors of a difference beyond which one thing is called better than another."""
NEGLIGIBLE = 1e-3
"""Nats at which nothing is at stake between steps: answers are lost at 0.02 and above (docs/defaults.md)."""
ENOUGH = 0.98
"""Of what a left-out document's own directions hold; below, more documents would give other bases."""
TIMES_WORST = 3.0
"""Times the worst divergence among the documents held out: what lies above is not like them."""
LEAST_KL = 0.01
"""Nats below which no divergence is called low: answers are lost at 0.02 and above (docs/defaults.md)."""
