"""`xkv chat`: a conversation about one document, in a terminal or a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xkv_cli.conversation_options import conversation_options, open_from, settings_of
from xkv_cli.new_file import NewFile


@click.command()
@conversation_options
@click.option(
    "--session",
    type=NewFile(),
    metavar="FILE",
    help="Go on with the conversation in FILE, or begin it; it is saved there at the end.",
)
@click.option(
    "--fold-after",
    type=click.IntRange(min=64),
    metavar="N",
    help="Make the conversation's tokens into factors when more than N are held exactly. Default: never.",
)
def chat(session: Path | None, **options: Any) -> int:
    """Talk about a document. Answers stream; every turn keeps what was computed before.

    The document's compressed cache is loaded, not computed: only what is said is. A document that is not
    stored yet is compressed first, and found again the next time. From a pipe every line is a question, and
    the answers go to stdout.

    \b
    Commands:
      /exact        answer the last question again, from the exact cache (prefilled when first asked for)
      /stats        tokens, bytes and speed
      /save [FILE]  save the conversation; --session FILE goes on with it
      /reset        forget the conversation, keep the document
      /help, /quit  (or Ctrl-D)
    Ctrl-C stops an answer.

    \b
    Examples:
      xkv chat --doc handbook.md
      xkv chat --artifact 3fa9c1 --session talk.xkv
      echo "Who keeps the keys?" | xkv chat --doc handbook.md

    Exit status: 0 all is well, 1 it cannot be opened or (from a pipe) a line could not be answered, 2 wrong
    usage. There is no --json: see `xkv ask`.
    """
    from xkv_cli.chat_loop import ChatLoop

    settings = settings_of(options)
    conversation = open_from({**options, "session": session})
    return ChatLoop(conversation, settings, session).run()
