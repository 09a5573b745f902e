"""`xkv precompute`: parse, run the pipeline, render."""

from __future__ import annotations

import sys
from typing import Any

import click

from xkv_cli.options import ManyValues, corpus_options, json_option, store_options, wrong_usage
from xkv_cli.times import TimeType


class RankType(click.ParamType[int | str]):
    """A rank: an integer, or the word full."""

    name = "N|full"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "full" or isinstance(value, int):
            return "full" if value == "full" else int(value)
        try:
            return int(value)
        except ValueError:
            self.fail(f'{value!r} is not a rank: use an integer or "full"', param, ctx)


@click.command(cls=ManyValues)
@corpus_options
@store_options
@click.option(
    "--ratio",
    type=float,
    metavar="X",
    help="Bytes of the exact cache for each byte stored, everything counted. Default: 8.",
)
@click.option("--rank-k", type=RankType(), help="Rank of each group's keys instead of --ratio.")
@click.option("--rank-v", type=RankType(), help="Rank of each group's values; goes with --rank-k.")
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="Adjacent layers that share token factors. Default: as the calibration has them, else 4.",
)
@click.option(
    "--calibration",
    metavar="ID|auto|none",
    default="auto",
    show_default=True,
    help="Calibration to compress with (xkv calibrate). auto: the model's newest in the store, if any, unless"
    " --rank-k, --rank-v or --group-size choose by hand what it would.",
)
@click.option(
    "--basis",
    type=click.Choice(["calibrated", "document"]),
    help="Layer bases: the calibration's, stored once for all documents, or each document's own. Default:"
    " what the calibration found best at the ratio.",
)
@click.option(
    "--bits",
    type=click.Choice(["mixed", "4", "8"]),
    help="Bits of token factors; mixed: 2, 4 or 8, by what a column is worth. Default: what the"
    " calibration found best at the ratio; 8 without.",
)
@click.option(
    "--namespace",
    default="default",
    show_default=True,
    metavar="NAME",
    help="Whose artifacts these are: letters, digits, dots, dashes and underscores.",
)
@click.option(
    "--min-fidelity",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="F",
    help="Publish nothing whose next tokens agree less with the exact cache, 0 to 1. Default: 0.",
)
@click.option(
    "--on-low-fidelity",
    type=click.Choice(["retry", "keep", "fail"]),
    help="An artifact, new or stored already, that is less faithful than documents of the calibration's"
    " sample, or further than 0.02 nats from exact (without a calibration: below --min-fidelity, else 0.9)"
    " is compressed again at half the ratio, kept, or refused. Default: retry with a calibration, else keep.",
)
@click.option(
    "--pin", is_flag=True, help="Keep the artifacts whatever happens (xkv pin), those stored already too."
)
@click.option(
    "--ttl",
    "ttl_s",
    type=TimeType(),
    help="Let the artifacts end so long after they are published: 90s, 15m, 12h, 7d (xkv ttl); those stored"
    " already so long from now. Default: no end of their own.",
)
@click.option(
    "--parts",
    is_flag=True,
    help="Measure the leading half and three quarters of each new artifact's columns too, so that a server"
    " may answer from them where all take too long to load. Takes some percent longer, and needs a"
    " calibration's bases. Artifacts that are stored already stay as they are: xkv rm them first.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be done, how many bytes and how long; do nothing."
)
@json_option
def precompute(as_json: bool, dry_run: bool, **options: Any) -> int:
    """Compress the KV cache of documents and store the factors.

    Each document is prefilled once with exact attention, its cache factorized (xKV), checked against the
    exact cache, and published as one file. Reads txt, md, rst, html, jsonl ("id" and "text" per line) and
    pdf (with the extra xkv-service[pdf]). A document that cannot be read is reported and the rest go on.

    Running it again computes only what is new: artifacts are known by the tokens of the document, so a
    renamed file costs nothing. It can be interrupted or killed at any time, and several can run at once.

    \b
    Examples:
      xkv precompute --docs handbook/ notes.md
      xkv precompute --docs corpus/*.txt --ratio 16 --dry-run
      xkv precompute --docs corpus/ --model ./llama --system-prompt system.txt --store s3://bucket/kv
      xkv precompute --docs corpus/ --calibration 3fa9c1 --ratio 32
      xkv precompute --docs news/ --ttl 7d
      xkv precompute --docs corpus/ --rank-k 384 --rank-v 576 --min-fidelity 0.9 --json

    \b
    With --json, one object:
      {"documents", "computed", "reused", "failed", "errors": [{"document", "reason"}], "tokens",
       "bytes_full", "bytes_stored", "ratio", "seconds", "calibration",
       "artifacts": [{"id", "document", "tokens", "bytes", "ratio", "fidelity", "retried",
                     "low"}]}
    retried is null, or what a second try brought in this run: {"fidelity", "kl", "kl_now"}, of the first try
    and now. low: the fidelity is, also after another try. With --parts there is "parts", too: {"measured",
    "unmeasured": [ID]}, of how many artifacts parts are measured, and which stored before could have some.
    With --dry-run --json:
      {"documents", "compute", "reuse", "failed", "errors", "tokens", "bytes_full", "bytes_stored",
       "seconds", "seconds_basis", "plan": [{"id", "document", "action", "tokens", "bytes_full", "bytes"}],
       "calibration"}
    calibration is the id of the one used, or null.

    Exit status: 0 all is well, 1 some documents failed, 2 wrong usage, 130 interrupted.
    """
    from xkv_artifacts.errors import InvalidLimits, InvalidNamespace
    from xkv_cli import render
    from xkv_cli.progress import watch
    from xkv_service.errors import InvalidSpec
    from xkv_workers.precompute import estimate, run
    from xkv_workers.request import Request

    try:
        request = Request.create(**options)
    except (InvalidSpec, InvalidNamespace, InvalidLimits) as error:
        raise wrong_usage(error) from None
    if dry_run:
        forecast = estimate(request)
        render.as_json(forecast.as_dict()) if as_json else render.forecast(forecast)
        return 1 if forecast.errors else 0
    with watch(sys.stderr) as observer:
        report = run(request, observer)
    render.as_json(report.as_dict()) if as_json else render.report(report)
    return 1 if report.errors else 0
