"""`--report` and `--plots`: what a calibration measured, as a page and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from xkv_cli.new_file import NewFile, NewFolder, writing

Command = TypeVar("Command", bound=Callable[..., Any])


def page_options(command: Command) -> Command:
    """The two options; a command hands them to `check_pages` first and to `write_pages` last."""
    for option in (
        click.option(
            "--plots",
            type=NewFolder(),
            metavar="DIR",
            help="Write the page's charts as PNG files. Needs the extra xkv-service[plot].",
        ),
        click.option(
            "--report", type=NewFile(".html"), metavar="FILE.html", help="Write what was measured as a page."
        ),
    ):
        command = option(command)
    return command


def check_pages(plots: Path | None) -> None:
    """See that pictures can be drawn, before hours of work.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if plots is not None:
        from xkv_service.analysis.picture import require_matplotlib

        require_matplotlib()


def write_pages(figures: Mapping[str, Any], report: Path | None, plots: Path | None) -> None:
    """Write what was asked for.

    Raises:
        XKVError: a file cannot be written.
    """
    from xkv_service.calibration.report_page import write_plots, write_report

    if report is not None:
        with writing(report):
            write_report(figures, report)
    if plots is not None:
        with writing(plots):
            write_plots(figures, plots)
