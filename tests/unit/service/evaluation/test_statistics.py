"""Means and errors of clustered scores, held against the textbook and against repeated draws."""

from __future__ import annotations

import math
import statistics
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xkv_service.evaluation.statistics import Estimate, average, difference, estimate

SCORES = st.lists(st.floats(0, 1), min_size=2, max_size=30)


@given(SCORES)
def test_one_question_a_document_is_the_usual_error_of_a_mean(scores: list[float]) -> None:
    found = estimate([[score] for score in scores])
    assert found.mean == pytest.approx(statistics.mean(scores))
    assert found.standard_error == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)))


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=2, max_size=10))
def test_a_method_does_not_differ_from_itself(clusters: list[list[float]]) -> None:
    assert difference(clusters, clusters) == Estimate(0.0, 0.0)


def test_questions_about_one_document_count_as_much_as_they_agree() -> None:
    agreeing = [[1.0] * 10, [0.0] * 10] * 8
    mixed = [[1.0, 0.0] * 5] * 16
    assert estimate(agreeing).standard_error == pytest.approx(
        estimate([[cluster[0]] for cluster in agreeing]).standard_error
    )
    assert estimate(mixed).standard_error == 0.0


def test_the_error_is_the_spread_of_repeated_measurements() -> None:
    rng = Random(0)

    def measured() -> Estimate:
        clusters = []
        for _ in range(40):
            share = rng.random()
            clusters.append([float(rng.random() < share) for _ in range(rng.randint(1, 6))])
        return estimate(clusters)

    runs = [measured() for _ in range(400)]
    told = statistics.mean(run.standard_error or 0 for run in runs)
    assert told == pytest.approx(statistics.stdev(run.mean for run in runs), rel=0.1)


def test_one_document_has_no_error_and_none_no_mean() -> None:
    assert estimate([[1.0, 0.0]]) == Estimate(0.5, None)
    with pytest.raises(ValueError, match="no scores"):
        estimate([])


def test_an_average_of_tasks() -> None:
    assert average([Estimate(1.0, 0.03), Estimate(0.5, 0.04)]) == Estimate(0.75, pytest.approx(0.025))
    assert average([Estimate(1.0, None), Estimate(0.5, 0.04)]).standard_error is None
