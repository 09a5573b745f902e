"""Results of `xkv eval` as a person reads them, as one JSON object, and the bar while they are made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xkv_cli import render
from xkv_service.evaluation.harness import Step
from xkv_service.evaluation.results import BASELINE, Results


def as_json(results: Results) -> None:
    """One object on stdout, without the single scores."""
    render.as_json(results.to_json(marks=False))


def to_file(results: Results, path: Path) -> None:
    """Everything, with the single scores."""
    path.write_text(json.dumps(results.to_json(marks=True), allow_nan=False) + "\n", "utf-8")


def results(found: Results) -> None:
    """A line for each task, length and method; what could not be measured, and why, on stderr."""
    rows = found.rows()
    turns = any("by_turn" in row for row in rows)
    head = ["task", "length", "method", "accuracy", "to full", "stored", "ratio", "n"]
    lines = [[*_line(row), *([_turns(row)] if turns else [])] for row in rows]
    render.table([*head, *(["by turn"] if turns else [])], lines, right=["length", "stored", "ratio", "n"])
    for row in rows:
        if "note" in row:
            sys.stderr.write(f"note: {row['method']} on {row['task']} at {row['length']:,}: {row['note']}\n")


def _line(row: Mapping[str, Any]) -> list[str]:
    name = [row["task"], f"{row['length']:,}", row["method"]]
    if "note" in row:
        return [*name, "not measured", "", "", "", ""]
    paired = row["method"] != BASELINE
    return [
        *name,
        _figure(row["accuracy"], row["standard_error"], "{:.3f}"),
        _figure(row["difference"], row["difference_error"], "{:+.3f}") if paired else "",
        render.size(row["bytes"]),
        f"{row['ratio']:.2f}x",
        f"{row['n']:,}",
    ]


def _figure(mean: float, error: float | None, form: str) -> str:
    return form.format(mean) + (f" ± {error:.3f}" if error is not None else "")


def _turns(row: Mapping[str, Any]) -> str:
    return " ".join(f"{turn['accuracy']:.3f}" for turn in row.get("by_turn", []))


@contextmanager
def watch(stream: TextIO) -> Iterator[Callable[[Step], None]]:
    """Draws a bar on `stream` while the block runs; nothing where it is no terminal."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        yield lambda step: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def observe(step: Step) -> None:
            bar.update(
                task,
                description=f"{step.task} at {step.length:,}",
                completed=step.done,
                total=step.total,
            )

        yield observe
