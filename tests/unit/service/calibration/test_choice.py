"""Which bases and bits a ratio is served with, from what validation measured."""

from __future__ import annotations

from typing import Any

import pytest

from xkv_artifacts.errors import CorruptArtifact
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec
from xkv_service.calibration.figure_checks import check_figures
from xkv_service.calibration.limits import NEGLIGIBLE
from xkv_service.calibration.steps import SHARED


def row(asked: float, step: str, kl: float, documents: int = 4, kl_error: float = 0.0) -> dict[str, Any]:
    return {"asked": asked, "step": step, "kl": kl, "documents": documents, "kl_error": kl_error}


def chosen(ratio: float, *rows: dict[str, Any]) -> tuple[str, str]:
    spec = best_spec(ratio, Calibration((), {}, {"validation": list(rows)}, "a" * 64))
    return spec.basis, spec.factor_dtype


def test_shared_bases_and_mixed_bits_where_nothing_is_at_stake() -> None:
    assert chosen(20.0) == ("calibrated", "mixed")
    assert chosen(20.0, row(20, SHARED, NEGLIGIBLE), row(20, "bits", 1e-9)) == ("calibrated", "mixed")


def test_the_least_divergence_where_something_is() -> None:
    rows = row(20, SHARED, 0.05), row(20, "bits", 0.01), row(20, "recipe", 0.001)
    assert chosen(20.0, *rows) == ("document", "mixed"), "the recipe needs no calibration and is no choice"


def test_the_ratio_tried_nearest_decides_and_the_higher_of_two() -> None:
    rows = row(8, "bits", 0.01), row(8, SHARED, 0.05), row(16, "bits", 0.09), row(16, SHARED, 0.05)
    assert chosen(9.0, *rows) == ("document", "mixed")
    assert chosen(12.0, *rows) == ("calibrated", "mixed")


def test_a_step_that_some_documents_were_too_short_for_wins_nothing() -> None:
    rows = row(20, SHARED, 0.002, documents=4), row(20, "bits", 0.0015, documents=1)
    assert chosen(20.0, *rows) == ("calibrated", "mixed")


def test_a_step_that_is_better_within_its_errors_wins_nothing() -> None:
    rows = row(20, SHARED, 0.004, kl_error=0.002), row(20, "bits", 0.001, kl_error=0.001)
    assert chosen(20.0, *rows) == ("calibrated", "mixed")
    rows = row(20, SHARED, 0.004, kl_error=0.0005), row(20, "bits", 0.001, kl_error=0.001)
    assert chosen(20.0, *rows) == ("document", "mixed")


@pytest.mark.parametrize(
    ("figures", "named"),
    [
        ({"validation": [{}]}, "figures.validation.0"),
        ({"validation": 5}, "figures.validation"),
        ({"validation": [{"asked": "x", "step": "bits"}]}, "figures.validation.0.asked"),
        ({"thresholds": [{}]}, "figures.thresholds.0"),
        ({"thresholds": [{"ratio": 8.0, "kl": -0.1}]}, "figures.thresholds.0.kl"),
        ({"selection": {"reuse": ["one"]}}, "figures.selection.reuse.0"),
    ],
)
def test_figures_that_decide_something_are_checked(figures: dict[str, Any], named: str) -> None:
    with pytest.raises(CorruptArtifact, match=named.replace(".", "[.]")):
        check_figures("a" * 64, figures)
