"""`xkv analyze`: parse, run the analysis, render."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xkv_cli.new_file import NewFile, writing
from xkv_cli.options import ManyValues, json_option

if TYPE_CHECKING:
    from xkv_service.analysis.report import Analysis

_PICTURES = (".png", ".svg", ".pdf")


@click.command(cls=ManyValues)
@click.option(
    "--docs",
    "paths",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    required=True,
    metavar="PATH...",
    help="Documents, as in xkv precompute. Longer ones than the widest group of layers say most.",
)
@click.option(
    "--model",
    metavar="NAME_OR_PATH",
    envvar="XKV_MODEL",
    help="Model to analyze. Default: XKV_MODEL, else the bundled one.",
)
@click.option("--revision", metavar="R", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--template",
    type=click.Choice(["chat", "raw"]),
    default="chat",
    show_default=True,
    help="chat: the document opens the first user turn of the model's chat template. raw: its text alone.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs.",
)
@click.option("--out", type=NewFile(), metavar="FILE.json", help="Write the JSON object to a file.")
@click.option(
    "--plot",
    type=NewFile(*_PICTURES),
    metavar="FILE.png",
    help="Draw the two panels: png, svg or pdf. Needs the extra xkv-service[plot].",
)
@json_option
def analyze(as_json: bool, out: Path | None, plot: Path | None, **options: Any) -> int:
    """Show what makes a model's layers compressible together: how alike they are, and what rank they need.

    Prefills each document exactly and compares its keys (before RoPE) and values: the linear CKA of every
    pair of layers, the singular values of groups of 1, 2, 4 and 8 neighbours, and the rank that holds 90, 95
    and 99 % of their energy. Averages over the documents come with how far apart the documents are. The page
    docs/analysis.md explains the picture.

    \b
    Examples:
      xkv analyze --docs examples/corpus --plot analysis.png
      xkv analyze --docs handbook/ --model ./llama --device cuda --out analysis.json
      xkv analyze --docs notes.md --json

    \b
    With --json, one object (and the same in the file of --out):
      {"model", "layers", "documents": [{"document", "tokens"}], "errors": [{"document", "reason"}],
       "keys" and "values": {"cka": {"mean", "deviation"}, "neighbours": {"mean", "low", "high"},
         "groups": [{"size", "spectrum": [[share of the width, singular value over the largest]],
           "ranks": [{"energy", "share_of_width", "rank_per_layer"}]}]}}

    Exit status: 0 all is well, 1 some documents failed, 2 wrong usage, 130 interrupted.
    """
    from xkv_cli import render
    from xkv_service.analysis import picture
    from xkv_workers.analyze import AnalysisRequest
    from xkv_workers.analyze import analyze as run

    if plot is not None:
        picture.require_matplotlib()
    found, errors = run(AnalysisRequest(**options), _announce)
    result = {**found.as_dict(), "errors": [vars(error) for error in errors]}
    render.as_json(result) if as_json else _show(found)
    if not as_json:
        render.errors(errors)
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(result, allow_nan=False) + "\n", "utf-8")
    if plot is not None:
        with writing(plot):
            picture.draw(found, plot)
    return 1 if errors else 0


def _announce(document: str) -> None:
    """Which document is being run, for a person who waits."""
    if sys.stderr.isatty():
        click.echo(f"analyzing {document}", err=True)


def _show(analysis: Analysis) -> None:
    from xkv_cli import render
    from xkv_service.analysis.report import ENERGIES, SIDES

    alike = [(f"CKA of neighbours, {side}", f"{analysis.neighbours(side).mean:.3f}") for side in SIDES]
    documents = (
        "documents",
        f"{len(analysis.documents):,}, the shortest of {analysis.least_tokens:,} tokens",
    )
    render.rows("", [documents, *alike])
    lines = [
        (side, str(size), *(render.percent(analysis.share_of_width(side, size, e).mean) for e in ENERGIES))
        for side in SIDES
        for size in analysis.sizes
    ]
    energies = tuple(f"rank for {100 * energy:.0f} %" for energy in ENERGIES)
    render.table(("", "layers in a group", *energies), lines, right=("layers in a group", *energies))
    if analysis.least_tokens < analysis.widest_group:
        click.echo(
            f"note: the rank of {analysis.least_tokens:,} tokens cannot exceed that, and the widest group has"
            f" {analysis.widest_group:,} features: longer documents say more",
            err=True,
        )
