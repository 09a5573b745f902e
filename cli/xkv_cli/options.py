"""Options that several commands share, each one decorator."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from xkv_artifacts.errors import XKVError
from xkv_workers.settings import default_store

Command = TypeVar("Command", bound=Callable[..., Any])


def store_options(command: Command) -> Command:
    """--store and --redis."""
    redis = click.option(
        "--redis",
        "redis_url",
        metavar="URL",
        envvar="XKV_REDIS_URL",
        help="Redis that keeps the catalog (redis://, rediss://, unix://). Default: XKV_REDIS_URL, else one"
        " that xkv starts beside the store.",
    )
    store = click.option(
        "--store",
        "store_url",
        metavar="URL",
        default=default_store,
        show_default=False,
        help="Where artifacts are kept: a folder, or a URL such as s3://bucket/path. Default: XKV_STORE, else"
        " ~/.local/share/xkv.",
    )
    return store(redis(command))


_MODEL = click.option(
    "--model",
    metavar="NAME_OR_PATH",
    envvar="XKV_MODEL",
    help="Model whose cache is compressed: a folder, or a name on the hub. Default: XKV_MODEL, else the small"
    " bundled model.",
)
_REVISION = click.option("--revision", metavar="R", help="Branch, tag or commit of a model on the hub.")
_DEVICE = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the model runs. auto: GPUs when there are any.",
)
_RAY_ADDRESS = click.option(
    "--ray-address",
    metavar="A",
    help='Ray cluster to use: "host:port" or "auto". Default: Ray is started here and stopped at the end.',
)


def place_options(command: Command) -> Command:
    """Which model, and where it runs."""
    for option in (_RAY_ADDRESS, _DEVICE, _REVISION, _MODEL):
        command = option(command)
    return command


_CORPUS_OPTIONS = (
    click.option(
        "--docs",
        "paths",
        type=click.Path(exists=True, path_type=Path),
        multiple=True,
        required=True,
        metavar="PATH...",
        help="Documents: files and folders, several after one flag or one flag each. Folders are read"
        " recursively, hidden files left out.",
    ),
    _MODEL,
    _REVISION,
    click.option(
        "--system-prompt",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="System prompt that every chat about the documents will have.",
    ),
    click.option(
        "--template",
        type=click.Choice(["chat", "raw"]),
        default="chat",
        show_default=True,
        help="chat: the document opens the first user turn of the model's chat template. raw: its text"
        " alone.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Worker processes. Default: one per GPU; on CPUs one per machine, of a small model one per"
        " core.",
    ),
    _DEVICE,
    _RAY_ADDRESS,
)


def corpus_options(command: Command) -> Command:
    """Which documents, of which model, and who works on them."""
    for option in reversed(_CORPUS_OPTIONS):
        command = option(command)
    return command


def wrong_usage(error: XKVError) -> click.UsageError:
    """An error that is about the options, named as they are typed: message and hint, exit status 2."""
    text = f"{error.message}: {error.hint}" if error.hint else error.message
    context = click.get_current_context(silent=True)
    for parameter in context.command.params if context else ():
        if parameter.name and (typed := max(parameter.opts, key=len)).startswith("--"):
            # A name of several words stands nowhere else; a plain word is an option where it has a value.
            behind = r"\b" if "_" in parameter.name else "(?==)"
            text = re.sub(rf"(?<![\w-]){parameter.name}{behind}", typed, text)
            value = context.params.get(parameter.name) if context else None
            if isinstance(value, float):
                text = text.replace(f"{typed}={value!r}", f"{typed}={value:.12g}")
    return click.UsageError(text)


def json_option(command: Command) -> Command:
    """--json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout, nothing else."
    )(command)


class ManyValues(click.Command):
    """A command without arguments, where `--docs a b c` means the same as `--docs a --docs b --docs c`.

    The same goes for every other option that may be given several times.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        following = ""
        for word in args:
            if word.startswith("-"):
                name, equals, _ = word.partition("=")
                following = name if equals and name in many else ""
                spread.append(word)
            elif following:
                spread += [following, word]
            else:
                following = spread[-1] if spread and spread[-1] in many else ""
                spread.append(word)
        return super().parse_args(ctx, spread)
