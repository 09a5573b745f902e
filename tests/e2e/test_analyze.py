"""`xkv analyze` from the command line, with the bundled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_runs import Xkv, words


def test_two_documents_are_analyzed(xkv: Xkv, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(900, seed=1))
    (tmp_path / "b.md").write_text(words(700, seed=2))
    out, plot = tmp_path / "analysis.json", tmp_path / "analysis.png"
    done = xkv(
        "analyze", "--docs", tmp_path / "a.txt", tmp_path / "b.md", "--out", out, "--plot", plot, "--json"
    )
    assert done.code == 0, done.err
    result = done.json
    assert json.loads(out.read_text()) == result
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [one["document"] for one in result["documents"]] == ["a.txt", "b.md"]
    assert len(result["keys"]["cka"]["mean"]) == len(result["layers"]) == 8
    assert [group["size"] for group in result["values"]["groups"]] == [1, 2, 4, 8]


def test_bad_documents_are_reported_and_the_rest_go_on(xkv: Xkv, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "good.txt").write_text(words(300))
    (tmp_path / "docs" / "empty.txt").write_text("")
    (tmp_path / "docs" / "long.txt").write_text(words(4000))
    done = xkv("analyze", "--docs", tmp_path / "docs", "--model", tiny_model)
    assert done.code == 1
    assert "failed docs/empty.txt: empty" in done.err
    assert "failed docs/long.txt: too long" in done.err and "window is 2,048" in done.err
    assert "CKA of neighbours, keys" in done.out and "95 %" in done.out


def test_a_full_disk_is_told_and_the_analysis_is_shown_all_the_same(xkv: Xkv, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(300))
    done = xkv("analyze", "--docs", tmp_path / "a.txt", "--out", "/dev/full", "--json")
    assert done.code == 1 and done.json["documents"]
    assert done.err.splitlines()[0] == "error: cannot write /dev/full: No space left on device"


def test_nothing_to_analyze_is_one_line(xkv: Xkv, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    done = xkv("analyze", "--docs", tmp_path / "empty.txt", "--model", tiny_model)
    assert done.code == 1 and done.out == ""
    assert done.err.splitlines()[0] == "error: no document can be analyzed"
    done = xkv("analyze", "--docs", tmp_path / "empty.txt", "--model", tmp_path / "no-model")
    assert done.code == 1 and done.err.startswith("error:") and "Traceback" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--docs", "no-such-file"],
        ["--docs", ".", "--plot", "picture.txt"],
        ["--docs", ".", "--plot", "no-such-folder/a.png"],
        ["--docs", ".", "--out", "no-such-folder/a.json"],
        ["--docs", ".", "--out", "."],
        ["--docs", ".", "--out", "/proc/a.json"],
        ["--docs", ".", "--plot", "/proc/a.png"],
    ],
)
def test_wrong_usage_exits_2(xkv: Xkv, arguments: list[str]) -> None:
    done = xkv("analyze", *arguments)
    assert done.code == 2 and "Error:" in done.err and done.out == ""


def test_plot_without_matplotlib_is_one_line(
    xkv: Xkv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "a.txt").write_text(words(300))
    done = xkv("analyze", "--docs", tmp_path / "a.txt", "--plot", tmp_path / "a.png")
    assert done.code == 1
    assert done.err.splitlines() == [
        "error: pictures need matplotlib, which is not installed",
        "hint: pip install 'xkv-service[plot]'",
    ]
