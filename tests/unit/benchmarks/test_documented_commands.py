"""Commands in the documentation are those that made the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("calibration_weights*.json"))


@pytest.mark.parametrize("result", RESULTS, ids=[one.stem for one in RESULTS])
def test_the_metrics_table_names_the_command_of_each_file(result: Path) -> None:
    page = (ROOT / "docs" / "calibration.md").read_text()
    short = page.replace("${OUT}", "$OUT").replace("$OUT", "benchmarks/results/calibration_weights")
    assert json.loads(result.read_text())["command"] in short


def test_there_are_results_of_four_models() -> None:
    assert len(RESULTS) == 4
