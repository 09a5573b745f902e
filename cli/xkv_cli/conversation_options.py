"""What `xkv chat` and `xkv ask` have in common: their options, and opening the conversation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xkv_cli.options import store_options, wrong_usage
from xkv_cli.plain_text import escaped

if TYPE_CHECKING:
    from xkv_service.sessions.settings import GenerationSettings
    from xkv_workers.conversation import Conversation

Command = TypeVar("Command", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class BudgetType(click.ParamType[int | float]):
    """Tokens as an integer, or a share of the prefix as a number with a point."""

    name = "N|share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        if isinstance(value, int | float):
            return value
        try:
            return float(value) if "." in value else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither tokens (256) nor a share of the prefix (0.1)", param, ctx)


_OPTIONS = (
    click.option(
        "--doc",
        "document",
        type=click.Path(exists=True, path_type=Path),
        metavar="PATH",
        help="Document to talk about. Compressed and stored first where it is not yet.",
    ),
    click.option(
        "--artifact",
        metavar="ID",
        help="Stored prefix to talk about; its first digits (4 or more) are enough where they are unique.",
    ),
    click.option(
        "--model",
        metavar="NAME_OR_PATH",
        envvar="XKV_MODEL",
        help="Model that answers: a folder, or a name on the hub. Default: XKV_MODEL, else the small bundled"
        " model.",
    ),
    click.option("--revision", metavar="R", help="Branch, tag or commit of a model on the hub."),
    store_options,
    click.option(
        "--ratio",
        type=float,
        metavar="X",
        help="Bytes of the exact cache for each byte stored. Default: as the document is stored, else 8.",
    ),
    click.option(
        "--selector",
        type=click.Choice(["auto", "sketch", "landmark", "exact", "dense"]),
        help="What chooses the tokens to rebuild. Default: auto, the index that the artifact has.",
    ),
    click.option(
        "--budget",
        type=BudgetType(),
        help="Tokens to rebuild for each new token, or their share of the prefix. Default: a sixteenth.",
    ),
    click.option("--system-prompt", type=_FILE, metavar="FILE", help="System prompt of the conversation."),
    click.option(
        "--template",
        type=click.Choice(["chat", "raw"]),
        default="chat",
        show_default=True,
        help="chat: the model's chat template. raw: plain text, for models without one.",
    ),
    click.option(
        "--namespace",
        default="default",
        show_default=True,
        metavar="NAME",
        help="Whose artifact a document becomes.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the model runs. auto: a GPU when there is one.",
    ),
    click.option(
        "--max-tokens",
        type=int,
        default=512,
        show_default=True,
        metavar="N",
        help="Longest answer.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        metavar="T",
        help="0: always the likeliest token; above: sampled.",
    ),
    click.option(
        "--top-p", type=float, default=1.0, show_default=True, metavar="P", help="Share that is sampled from."
    ),
    click.option("--seed", type=int, metavar="N", help="Of the sampling. Default: another one each time."),
)


def conversation_options(command: Command) -> Command:
    """Every option that says what is talked about, with whom, and how answers are decoded."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_of(options: dict[str, Any]) -> GenerationSettings:
    """Take the options of decoding out of `options`.

    Raises:
        click.UsageError: one is out of range.
    """
    from xkv_service.errors import InvalidSpec
    from xkv_service.sessions.settings import GenerationSettings

    names = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}
    try:
        return GenerationSettings(**{field: options.pop(name) for field, name in names.items()})
    except InvalidSpec as error:
        raise wrong_usage(error) from None


def open_from(options: dict[str, Any]) -> Conversation:
    """Open the conversation that the other options name; what takes a while is told on stderr.

    Raises:
        click.UsageError: options that do not go together, or out of range.
        XKVError: it cannot be opened.
    """
    # OpenMP's threads spin while they wait, which is slow wherever cores are shared. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from xkv_artifacts.errors import InvalidNamespace
    from xkv_service.errors import InvalidSpec
    from xkv_workers.conversation import ConversationRequest, open_conversation

    try:
        request = ConversationRequest.create(**options)
    except (InvalidSpec, InvalidNamespace) as error:
        raise wrong_usage(error) from None
    return open_conversation(request, tell)


def tell(text: str) -> None:
    """A line for the person, not for the pipe."""
    click.echo(f"note: {escaped(text)}", err=True)
