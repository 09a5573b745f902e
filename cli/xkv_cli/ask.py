"""`xkv ask`: one question, one answer."""

from __future__ import annotations

import sys
from typing import Any

import click

from xkv_cli.conversation_options import conversation_options, open_from, settings_of
from xkv_cli.options import json_option


@click.command()
@click.argument("question")
@conversation_options
@click.option("--exact", is_flag=True, help="Answer from the exact cache, prefilled now; for comparison.")
@json_option
def ask(question: str, as_json: bool, **options: Any) -> int:
    """Ask one QUESTION about a document, and print the answer.

    The document's compressed cache is loaded, not computed: only the question is. A document that is not
    stored yet is compressed first, and found again the next time. "-" reads the question from stdin.

    \b
    Examples:
      xkv ask --doc handbook.md "Who keeps the keys?"
      xkv ask --artifact 3fa9c1 "Who keeps the keys?" --json
      xkv ask --doc handbook.md "Who keeps the keys?" --exact

    \b
    With --json, one object:
      {"answer", "finish", "artifact", "document", "prompt_tokens", "cached_tokens", "generated_tokens",
       "rebuilt_tokens", "seconds", "first_token_seconds", "bytes", "bytes_full"}
    artifact is null and bytes 0 with --exact. rebuilt_tokens: prefix tokens rebuilt for each new token.

    Exit status: 0 answered, 1 it cannot be, 2 wrong usage, 130 interrupted.
    """
    from xkv_cli import conversation_render, render

    settings = settings_of(options)
    text = sys.stdin.read().strip() if question == "-" else question
    if not text.strip():
        raise click.UsageError("the question is empty")
    conversation = open_from(options)
    reply = conversation.session.send(text, settings)
    if as_json:
        render.as_json(conversation_render.answer(conversation, reply))
    else:
        click.echo(conversation_render.printable(reply.text))
    return 0
