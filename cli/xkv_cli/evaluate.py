"""`xkv eval`: parse, measure, render."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xkv_cli.new_file import NewFile
from xkv_cli.options import ManyValues, json_option, wrong_usage

if TYPE_CHECKING:
    from xkv_service.evaluation.plan import Plan

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_WHICH_FILE = (
    "calibration= takes the path of a calibration's file, calibrations/<first 2 digits>/<ID>.safetensors in a"
    " store's folder; `xkv calibrations ls` lists ids"
)


@click.command("eval", cls=ManyValues)
@click.option(
    "--model",
    metavar="NAME_OR_PATH",
    envvar="XKV_MODEL",
    help="Model that answers: a folder, or a name on the hub. Default: XKV_MODEL, else the small bundled"
    " model.",
)
@click.option("--revision", metavar="R", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="TASK...",
    help="What is asked; ruler and demo stand for all of theirs. Default: demo_documents with the bundled"
    " model, else ruler.",
)
@click.option(
    "--methods",
    multiple=True,
    default=("xkv",),
    show_default=True,
    metavar="METHOD...",
    help="How the cache is held: name:option=value,option=value. full is always measured too.",
)
@click.option(
    "--lengths",
    multiple=True,
    type=int,
    default=(4096,),
    show_default=True,
    metavar="N...",
    help="Tokens: of prompt and reply together in RULER's tasks, of the document in demo tasks.",
)
@click.option(
    "--protocol",
    default="question-later",
    show_default=True,
    metavar="P",
    help="question-later, question-inside, five-turns or many-requests, see above.",
)
@click.option(
    "--samples",
    type=int,
    default=500,
    show_default=True,
    metavar="N",
    help="Questions of each task and length.",
)
@click.option(
    "--per-document",
    type=int,
    metavar="N",
    help="Questions about each document. Default: 1; 5 in five-turns; 20 in many-requests.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all documents and questions.")
@click.option(
    "--shard",
    default="1/1",
    show_default=True,
    metavar="I/N",
    help="Run part I of N of the documents; the parts' --out files merge to the whole.",
)
@click.option(
    "--template",
    type=click.Choice(["chat", "raw"]),
    help="chat: the model's chat template. raw: plain text. Default: chat where the model has a template.",
)
@click.option("--haystack", type=_FILE, metavar="FILE", help="Text to hide needles in. Default: own prose.")
@click.option(
    "--qa-data",
    type=_FILE,
    metavar="FILE",
    help="Passages and questions for qa, in SQuAD's JSON format. Default: own short notes.",
)
@click.option("--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    metavar="T",
    help="auto (float32 on a CPU, else the checkpoint's), float32, bfloat16 or float16.",
)
@click.option(
    "--out",
    type=NewFile(),
    metavar="FILE",
    help="Write the results with every single score, as JSON; kept up to date while they are made.",
)
@json_option
def evaluate(as_json: bool, out: Path | None, **options: Any) -> int:
    """Measure what a compressed cache is worth: answers, paired with those of the exact cache.

    Every method sees the same documents and questions. Of each document the cache is computed once, exactly;
    each method then holds it in its own way, and the same questions are answered greedily.

    \b
    Tasks after RULER (arXiv 2404.06654), worded anew; a score is the share of expected strings in the reply:
      niah_single_1 .. 3, niah_multikey_1 .. 3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa
    Tasks of the bundled model, right when the whole reply is:
      demo_documents, demo_facts, demo_chains, demo_lists, demo_niah_..., demo_variable_tracking

    \b
    Methods, with full, the exact cache, always among them:
      xkv:group=4,ratio=8,index=none             factors, rebuilt before the question
      xkv:ratio=8,selector=sketch,budget=256     factors, 256 tokens of them rebuilt for each new token
      xkv:ratio=20,calibration=FILE              with a calibration: the path of its file in a store
      snapkv:ratio=8  minicache  quantized       others (an unknown option lists a method's options)

    \b
    Protocols:
      question-later    the prefix is the document; the question comes when it is compressed
      question-inside   the prefix is document and question; only the answer is decoded on the method's cache
      five-turns        five questions about a document in one conversation, accuracy by turn
      many-requests     many questions about one document, each a request with a fresh cache

    \b
    Examples:
      xkv eval --samples 48 --per-document 24 --methods xkv:ratio=8 xkv:group=1,ratio=8
      xkv eval --model ./llama --tasks ruler --lengths 32768 65536 --methods xkv snapkv --out llama.json
      xkv eval --model ./llama --tasks qa --qa-data dev-v1.1.json --protocol question-inside --json

    \b
    With --json, one object:
      {"model", "protocol", "seed", "samples", ..., "rows": [{"task", "length", "method", "accuracy",
       "standard_error", "difference", "difference_error", "n", "documents", "tokens", "bytes_full",
       "bytes", "ratio", "by_turn"?, "note"?}]}
    "difference" is to full over the same questions; standard errors are over documents; "bytes" counts
    everything stored, and "ratio" is bytes_full / bytes.

    Exit status: 0 all is well, 1 something failed or could not be measured (the row's "note" says why), 2
    wrong usage, 130 interrupted.
    """
    from xkv_cli import evaluation_render
    from xkv_service.errors import DeviceUnavailable, InvalidSpec, ModelNotFound

    try:
        results = _measured(options, out)
    except (InvalidSpec, ModelNotFound, DeviceUnavailable) as error:
        raise wrong_usage(error) from None
    if as_json:
        evaluation_render.as_json(results)
    else:
        evaluation_render.results(results)
    if out is not None:
        evaluation_render.to_file(results, out)
    return 1 if any("note" in row for row in results.rows()) else 0


def _measured(options: dict[str, Any], out: Path | None) -> Any:
    from xkv_artifacts.errors import StoreError
    from xkv_cli.evaluation_render import watch
    from xkv_service.demo import demo_model_path
    from xkv_service.evaluation.harness import evaluate as run
    from xkv_service.evaluation.plan import Plan
    from xkv_service.modeling.models import load_model

    model, revision = options.pop("model"), options.pop("revision")
    device, dtype = options.pop("device"), options.pop("dtype")
    options["tasks"] = options["tasks"] or (("ruler",) if model else ("demo_documents",))
    try:
        plan = Plan.create(**options)
    except StoreError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise wrong_usage(StoreError(error.message, hint=_WHICH_FILE)) from None
    loaded = load_model(model or demo_model_path(), revision, device=device, dtype=dtype)
    with watch(sys.stderr, out, _begun(plan)) as observe:
        return run(loaded, plan, observe)


def _begun(plan: Plan) -> str:
    """What is measured, in a line."""
    count = len(plan.documents()) * len(plan.tasks) * len(plan.lengths)
    return f"measuring {', '.join(plan.methods)} on {count:,} document{'s' * (count != 1)}"
