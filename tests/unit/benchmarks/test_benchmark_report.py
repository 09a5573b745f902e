"""What a benchmark writes: a run that is ended leaves what it measured, and the earlier result as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Report


def test_rows_are_on_disk_as_soon_as_they_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "one.json"
    path.parent.mkdir()
    path.write_text("earlier")
    written = Report("one", "python one.py", "nothing")
    written.keep(path, documents=3)
    for number in range(3):
        written.add(step=number, kl=0.5)
        kept = json.loads(path.with_suffix(".partial.json").read_text())
        assert len(kept["rows"]) == number + 1 and kept["unfinished"] and kept["documents"] == 3
    assert path.read_text() == "earlier"

    written.write(path, tokens=9)
    done = json.loads(path.read_text())
    assert done["rows"] == kept["rows"] and (done["documents"], done["tokens"]) == (3, 9)
    assert "unfinished" not in done and list(path.parent.iterdir()) == [path]
    assert "| step | kl" in capsys.readouterr().out


def test_the_command_tells_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(report.__file__).with_name("reuse.py")
    inside, outside = script.parent / "results" / "reuse.json", Path("/home/somebody/runs/second/model")
    arguments = ["--out", str(inside), f"--model={outside}", "--url", "s3://bucket/kv", "--at", "runs/x"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    told = "--out benchmarks/results/reuse.json --model=model --url s3://bucket/kv --at runs/x"
    assert report.command() == f"python benchmarks/reuse.py {told}"
    assert report.command([inside]).startswith("python benchmarks/reuse.py --part I/N for 1 parts")


def test_no_result_names_a_folder_of_a_machine() -> None:
    results = list(Path(report.__file__).with_name("results").rglob("*.json"))
    commands = [found["command"] for path in results if "command" in (found := json.loads(path.read_text()))]
    assert len(commands) > 30
    assert [one for one in commands if any(part.startswith("/") for part in one.split())] == []
