"""Commands in the documentation are those that made the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("calibration_weights*.json"))
TRAFFIC = sorted((ROOT / "benchmarks" / "results").glob("traffic*.json"))


@pytest.mark.parametrize("result", RESULTS, ids=[one.stem for one in RESULTS])
def test_the_metrics_table_names_the_command_of_each_file(result: Path) -> None:
    page = (ROOT / "docs" / "calibration.md").read_text()
    short = page.replace("${OUT}", "$OUT").replace("$OUT", "benchmarks/results/calibration_weights")
    assert json.loads(result.read_text())["command"] in short


def test_there_are_results_of_four_models() -> None:
    assert len(RESULTS) == 4


@pytest.mark.parametrize("result", TRAFFIC, ids=[one.stem for one in TRAFFIC])
def test_each_run_of_traffic_has_its_command_and_its_file_on_the_page(result: Path) -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    command = json.loads(result.read_text())["command"]
    _, options, out = re.split(r"traffic.py |--out ", command)
    assert out == f"benchmarks/results/{result.name}" and f"../{out}" in page
    assert f"| `{options.strip()}` |" in page if options else "| nothing |" in page


def test_there_are_nineteen_runs_of_traffic() -> None:
    assert len(TRAFFIC) == 19
