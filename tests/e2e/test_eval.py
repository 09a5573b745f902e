"""`xkv eval` end to end, on the bundled model and short documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_runs import Xkv

COLUMNS = [
    "task", "length", "method", "accuracy", "standard_error", "difference", "difference_error", "n",
    "documents", "tokens", "bytes_full", "bytes", "ratio",
]  # fmt: skip


def test_methods_are_compared_on_the_same_questions(xkv: Xkv, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = xkv(
        "eval", "--tasks", "demo_facts", "qa", "--methods", "snapkv:ratio=2", "xkv:ratio=3", "--lengths", 400,
        "--samples", 1, "--device", "cpu", "--json", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method)
        for task in ("demo_facts", "qa", "average")
        for method in ("full", "snapkv:ratio=2", "xkv:ratio=3")
    ]
    assert all(list(row) == COLUMNS for row in rows)
    assert (rows[0]["accuracy"], rows[2]["accuracy"]) == (1.0, 1.0)
    assert rows[2]["ratio"] == pytest.approx(rows[2]["bytes_full"] / rows[2]["bytes"])
    kept = json.loads(out.read_text())
    assert kept["rows"] == rows and len(kept["marks"]) == 6


def test_a_person_gets_a_table(xkv: Xkv) -> None:
    done = xkv(
        "eval", "--lengths", "600", "--samples", "5", "--protocol", "five-turns", "--methods", "xkv:ratio=3",
        "xkv:ratio=900", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 1, "one method could not be measured"
    head, full, xkv_row, missed = done.out.splitlines()
    assert " ".join(head.split()) == "task length method accuracy to full stored ratio n by turn"
    assert "1.00x" in full and full.rstrip().endswith("1.000 1.000 1.000 1.000 1.000")
    assert "xkv:ratio=3" in xkv_row and " 5 " in xkv_row
    assert "not measured" in missed and "ratio=900 cannot be reached" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "niah"], "task 'niah' is unknown"),
        (["--methods", "h2o"], "method 'h2o' is unknown"),
        (["--methods", "xkv:calibration=dbe17073ab1d"], "takes the path of a calibration's file"),
        (["--lengths", "16385"], "beyond the model's window of 16384"),
        (["--samples", "0"], "samples=0"),
        (["--model", "no/such/folder"], "no model folder"),
        (["--out", "no/such/folder/results.json"], "there is no folder"),
        (["--out", "/proc/results.json"], "'/proc/results.json' cannot be written: "),
        (["--tasks", "niah_multikey_1", "--lengths", "90"], "needs at least"),
    ],
)
def test_wrong_usage_is_one_line(xkv: Xkv, arguments: list[str], message: str) -> None:
    done = xkv("eval", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err.splitlines()[-1] and "Traceback" not in done.err


def test_a_full_disk_is_told_and_the_results_are_shown_all_the_same(xkv: Xkv) -> None:
    done = xkv("eval", "--lengths", 400, "--samples", 1, "--device", "cpu", "--json", "--out", "/dev/full")
    assert done.code == 1 and len(done.json["rows"]) == 2
    assert done.err.splitlines() == [
        "note: measuring full, xkv on 1 document",
        "error: cannot write /dev/full: No space left on device",
        "hint: make room, or give another place",
    ]


def test_broken_question_data_and_missing_tokenizers_are_told(
    xkv: Xkv, tmp_path: Path, tiny_model: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text("{}")
    done = xkv("eval", "--tasks", "qa", "--qa-data", data)
    assert done.code == 2 and "data.json is no question data" in done.err
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    done = xkv("eval", "--model", model)
    assert done.code == 2 and "has no tokenizer" in done.err
