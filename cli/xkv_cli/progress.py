"""The progress bar on stderr; on anything but a terminal, only what a person must know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from xkv_cli.plain_text import escaped
from xkv_workers.observer import Observer, Progress


@contextmanager
def watch(stream: TextIO) -> Iterator[Observer]:
    """An observer that draws on `stream` while the block runs."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        yield Notes(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        yield _Drawn(console, bar)


class Notes:
    """What is told where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def progress(self, now: Progress) -> None:
        """Nothing: a log file is no place for a bar."""

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(f"note: {escaped(text)}", markup=False, soft_wrap=True)


class _Drawn(Notes):
    def __init__(self, console: Console, bar: Bar) -> None:
        super().__init__(console)
        self._bar = bar
        self._task = bar.add_task("starting", total=None, figures="", eta="")

    def progress(self, now: Progress) -> None:
        """Move the bar."""
        figures = ["computing" if now.ready else "loading the model" if now.tokens_left else "reading"]
        if now.tokens_per_second:
            figures = [f"{now.tokens_per_second:,.0f} tokens/s"]
        if now.ratio:
            figures.append(f"{now.ratio:.1f}x")
        left = None if now.seconds_left is None else round(now.seconds_left)
        self._bar.update(
            self._task,
            description=f"{now.settled}/{now.documents}{'+' if now.reading else ''} documents",
            completed=now.settled,
            total=now.documents or None,
            figures="  ".join(figures),
            eta="" if left is None else f"ETA {left // 60}:{left % 60:02}",
        )
