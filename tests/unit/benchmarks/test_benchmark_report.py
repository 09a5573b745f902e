"""What a benchmark writes: a run that is ended leaves what it measured, and the earlier result as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import Report


def test_rows_are_on_disk_as_soon_as_they_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "one.json"
    path.parent.mkdir()
    path.write_text("earlier")
    report = Report("one", "python one.py", "nothing")
    report.keep(path, documents=3)
    for number in range(3):
        report.add(step=number, kl=0.5)
        kept = json.loads(path.with_suffix(".partial.json").read_text())
        assert len(kept["rows"]) == number + 1 and kept["unfinished"] and kept["documents"] == 3
    assert path.read_text() == "earlier"

    report.write(path, tokens=9)
    done = json.loads(path.read_text())
    assert done["rows"] == kept["rows"] and (done["documents"], done["tokens"]) == (3, 9)
    assert "unfinished" not in done and list(path.parent.iterdir()) == [path]
    assert "| step | kl" in capsys.readouterr().out
