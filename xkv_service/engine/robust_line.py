"""A straight line through the last observations that a few odd ones do not move."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import combinations
from statistics import median

_KEPT = 32
_DISTINCT = 0.05


class RobustLine:
    """y = intercept + slope x with neither below 0, by medians (Theil and Sen): up to 29 % of the
    observations may be anything.

    Args:
        start: observations (x, y) to believe until as many real ones outvote them; at least one.
    """

    def __init__(self, start: Sequence[tuple[float, float]]) -> None:
        self._seen: deque[tuple[float, float]] = deque(start, maxlen=_KEPT)
        self._believed = len(start)  # of what was seen, the oldest: nobody observed them
        self._fit: tuple[float, float] | None = None

    def observe(self, x: float, y: float) -> None:
        """One more observation; of more than 32 the oldest is forgotten."""
        if len(self._seen) == _KEPT:
            self._believed = max(0, self._believed - 1)
        self._seen.append((x, y))
        self._fit = None

    @property
    def fit(self) -> tuple[float, float]:
        """(intercept, slope)."""
        if self._fit is None:
            self._fit = self._fitted()
        return self._fit

    def __call__(self, x: float) -> float:
        """y at x; past twice the largest x that was seen, y there: a line says little far from its points."""
        intercept, slope = self.fit
        return intercept + slope * min(x, 2 * max(seen for seen, _ in self._seen))

    def _fitted(self) -> tuple[float, float]:
        # What was never observed must not make all that was alike.
        observed = list(self._seen)[self._believed :] or self._seen
        far = _DISTINCT * max(abs(x) for x, _ in observed)
        slopes = [(d - b) / (c - a) for (a, b), (c, d) in combinations(self._seen, 2) if abs(c - a) > far]
        slope = max(0.0, median(slopes)) if slopes else 0.0
        intercept = median(y - slope * x for x, y in self._seen)
        if intercept >= 0:
            return intercept, slope
        return 0.0, median(y / x for x, y in self._seen if x > 0)
