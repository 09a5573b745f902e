"""What fidelity is usual at a ratio, and what is low beside it."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_service.calibration import certificates
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.certificates import fidelity_thresholds
from xkv_service.calibration.limits import LEAST_KL, LOST, TIMES_WORST, fidelity_limit
from xkv_service.calibration.probes import ProbedPrefix

HELD = [ProbedPrefix("a", (1,), ()), ProbedPrefix("b", (2,), ())]
CALIBRATION = Calibration((), {}, {}, "a" * 64)


def thresholds(monkeypatch: pytest.MonkeyPatch, measured: dict[float, list[float]]) -> list[dict[str, float]]:
    """Thresholds, given the divergence of each document held out, by ratio."""

    def kl(model: Any, document: ProbedPrefix, spec: Any, calibration: Calibration) -> float:
        return measured[spec.ratio][HELD.index(document)]

    monkeypatch.setattr(certificates, "_kl", kl)
    model: Any = None
    return fidelity_thresholds(model, HELD, tuple(measured), CALIBRATION)


def test_the_worst_document_sets_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    found = thresholds(monkeypatch, {8.0: [0.0, 0.001], 20.0: [0.005, 0.004]})
    assert found[0] == {"ratio": 8.0, "worst": 0.001, "kl": LEAST_KL}
    assert found[1] == {"ratio": 20.0, "worst": 0.005, "kl": pytest.approx(TIMES_WORST * 0.005)}


@pytest.mark.parametrize("worst", [0.0067, 0.018, 0.5])
def test_what_loses_answers_is_low_even_where_the_sample_does(
    monkeypatch: pytest.MonkeyPatch, worst: float
) -> None:
    """A sample that is lost itself sets no standard."""
    (found,) = thresholds(monkeypatch, {48.0: [0.0, worst]})
    assert found == {"ratio": 48.0, "worst": worst, "kl": LOST}
    assert fidelity_limit(48.0, {"thresholds": [found]}) == LOST


def test_limits_of_earlier_calibrations_end_there_too() -> None:
    figures = {"thresholds": [{"ratio": 32.0, "kl": 0.036}, {"ratio": 48.0, "kl": 0.054}]}
    assert fidelity_limit(32.0, figures) == fidelity_limit(64.0, figures) == LOST


def test_a_ratio_that_breaks_the_predictions_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite number could not be stored either."""
    found = thresholds(monkeypatch, {8.0: [0.0, 0.0], 48.0: [0.1, float("inf")]})
    assert [one["ratio"] for one in found] == [8.0]


@pytest.mark.parametrize(
    ("ratio", "limit"), [(2, 0.01), (8, 0.01), (9, 0.015), (20, 0.015), (21, 0.015), (None, None)]
)
def test_the_threshold_of_the_next_higher_ratio_counts(ratio: float | None, limit: float | None) -> None:
    figures = {"thresholds": [{"ratio": 20.0, "kl": 0.015}, {"ratio": 8.0, "kl": 0.01}]}
    assert fidelity_limit(ratio, figures) == limit
    assert fidelity_limit(ratio, {}) is None
