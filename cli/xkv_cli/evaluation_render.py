"""Results of `xkv eval` as a person reads them, as one JSON object, and what is told while they are made."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xkv_cli import render
from xkv_cli.new_file import writing
from xkv_cli.plain_text import escaped
from xkv_cli.progress import Notes
from xkv_service.evaluation.harness import Step
from xkv_service.evaluation.results import BASELINE, Results

_KEEP_SECONDS = 30
_TENTHS = 10


def as_json(results: Results) -> None:
    """One object on stdout, without the single scores."""
    render.as_json(results.to_json(marks=False))


def to_file(results: Results, path: Path) -> None:
    """Everything, with the single scores.

    Raises:
        XKVError: the file cannot be written.
    """
    text = json.dumps(results.to_json(marks=True), allow_nan=False) + "\n"
    with writing(path):
        if path.exists() and not path.is_file():  # a pipe or device is written to, never replaced
            path.write_text(text, "utf-8")
            return
        beside = path.with_name(path.name + ".part")
        beside.write_text(text, "utf-8")
        beside.replace(path)


def results(found: Results) -> None:
    """A line for each task, length and method; what could not be measured, and why, on stderr."""
    rows = found.rows()
    turns = any("by_turn" in row for row in rows)
    head = ["task", "length", "method", "accuracy", "to full", "stored", "ratio", "n"]
    lines = [[*_line(row), *([_turns(row)] if turns else [])] for row in rows]
    render.table([*head, *(["by turn"] if turns else [])], lines, right=["length", "stored", "ratio", "n"])
    for row in rows:
        if "note" in row:
            told = escaped(f"{row['method']} on {row['task']} at {row['length']:,}: {row['note']}")
            sys.stderr.write(f"note: {told}\n")


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
def watch(stream: TextIO, out: Path | None, begun: str) -> Iterator[Callable[[Step], None]]:
    """While the block runs: a bar on `stream`, or notes where it is no terminal, and a file kept up to date.

    Args:
        begun: the first note.
    """
    keep = _Keeper(out)
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        notes = Notes(console)
        notes.note(begun)
        tell = _Teller(notes)

        def follow(step: Step) -> None:
            tell(step)
            keep(step)

        yield follow
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
            keep(step)

        yield observe


class _Teller:
    """Notes how far a run is, after each tenth of it."""

    def __init__(self, notes: Notes) -> None:
        self._notes, self._started = notes, time.monotonic()

    def __call__(self, step: Step) -> None:
        tenth = _TENTHS * step.done // step.total
        if step.done < step.total and tenth > _TENTHS * (step.done - 1) // step.total:
            where = f"{step.done:,} of {step.total:,} documents, {step.task} at {step.length:,}"
            self._notes.note(f"{where}: {time.monotonic() - self._started:.0f} s")


class _Keeper:
    """Writes the results so far every half minute, so that an interrupted run leaves what it has."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._written = path, time.monotonic()

    def __call__(self, step: Step) -> None:
        if self._path is not None and time.monotonic() - self._written > _KEEP_SECONDS:
            to_file(step.results, self._path)
            self._written = time.monotonic()
