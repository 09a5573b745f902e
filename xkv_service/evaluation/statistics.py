"""Means and standard errors of scores in clusters: questions about one document are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Clusters = Sequence[Sequence[float]]
"""Scores of each document's questions."""


@dataclass(frozen=True)
class Estimate:
    """A mean over all questions and its standard error, None with fewer than two documents."""

    mean: float
    standard_error: float | None


def estimate(clusters: Clusters) -> Estimate:
    """The mean over all scores, with the standard error of a mean over clusters of unequal size.

    The documents are the sample: var = D / (D - 1) * sum_d (sum_i (x_di - mean))^2 / n^2, which for one
    question a document is the usual variance of a mean.

    Raises:
        ValueError: no scores.
    """
    count = sum(map(len, clusters))
    if count == 0:
        raise ValueError("no scores to take the mean of")
    mean = sum(map(sum, clusters)) / count
    if len(clusters) < 2:
        return Estimate(mean, None)
    spread = sum((sum(scores) - mean * len(scores)) ** 2 for scores in clusters)
    return Estimate(mean, math.sqrt(len(clusters) / (len(clusters) - 1) * spread) / count)


def difference(clusters: Clusters, baseline: Clusters) -> Estimate:
    """The mean of the paired differences of two methods over the same questions."""
    return estimate(
        [
            [score - base for score, base in zip(scores, bases, strict=True)]
            for scores, bases in zip(clusters, baseline, strict=True)
        ]
    )


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, such as those of different tasks."""
    mean = sum(one.mean for one in estimates) / len(estimates)
    errors = [one.standard_error for one in estimates]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(sum(error**2 for error in known)) / len(errors))
