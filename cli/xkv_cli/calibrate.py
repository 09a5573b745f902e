"""`xkv calibrate`: parse, run, render."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from xkv_cli.calibration_pages import check_pages, page_options, write_pages
from xkv_cli.options import ManyValues, corpus_options, json_option, store_options, wrong_usage


@click.command(cls=ManyValues)
@corpus_options
@store_options
@click.option(
    "--questions",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Questions about the documents: for name.txt the file name.questions.jsonl there, a line"
    ' {"question", "answer"} each; the first 8 are used. Default: the end of each document is what is asked.',
)
@click.option(
    "--ratio",
    type=float,
    metavar="X",
    help="Bytes of the exact cache for each byte stored at which choices are made. Default: 48; with latent"
    " attention, which keeps a part exact, 48 of the rest.",
)
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="Most adjacent layers that share token factors. Default: 4.",
)
@click.option(
    "--from",
    "earlier",
    metavar="ID",
    help="Add the documents to what this calibration in the store was made from; its own documents are not"
    " needed. It may be shortened to its first digits (4 or more).",
)
@page_options
@json_option
def calibrate(as_json: bool, report: Path | None, plots: Path | None, **options: Any) -> int:
    """Measure once what a model's layers share, so that documents are compressed further.

    Runs the model over documents like those that will be compressed, makes bases of layers' keys and values
    that all of them share, and chooses groups, metric and bits by what answers lose. Every fourth document
    is kept to check it on. The calibration goes to the store, where `xkv precompute`, `xkv chat` and `xkv
    ask` find it, instead of one made before or of the bundled model's own.

    It can be interrupted or killed: the same command goes on behind the last document written down.

    \b
    Examples:
      xkv calibrate --docs handbook/ --model ./llama
      xkv calibrate --docs examples/corpus --questions examples/questions
      xkv calibrate --docs more/ --from 3fa9c1
      xkv calibrate --docs corpus/ --ratio 32 --report calibration.html --plots pictures --json

    \b
    With --json, one object:
      {"id", "model", "documents", "held_out", "tokens", "replaced", "errors": [{"document", "reason"}],
       "seconds", "figures"}
    replaced is the id of the calibration that was used for this model until now, or null.
    The page docs/calibration.md explains the figures.

    Exit status: 0 all is well, 1 some documents failed or no calibration was made, 2 wrong usage, 130
    interrupted.
    """
    from xkv_cli import calibration_render, render
    from xkv_cli.progress import watch
    from xkv_service.errors import InvalidSpec
    from xkv_workers.calibrate import CalibrationRequest
    from xkv_workers.calibrate import calibrate as run

    try:
        request = CalibrationRequest.create(**options)
    except InvalidSpec as error:
        raise wrong_usage(error) from None
    check_pages(plots)
    with watch(sys.stderr) as observer:
        result = run(request, observer)
    render.as_json(result.as_dict()) if as_json else calibration_render.report(result)
    write_pages(result.figures, report, plots)
    return 1 if result.errors else 0
