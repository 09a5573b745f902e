"""Answers and the figures of a conversation, as a person reads them or as plain values."""

from __future__ import annotations

from typing import Any

from xkv_cli import render
from xkv_service.sessions.reply import Reply
from xkv_workers.conversation import Conversation


def answer(conversation: Conversation, reply: Reply) -> dict[str, Any]:
    """What `xkv ask --json` prints."""
    figures = reply.as_dict()
    del figures["dropped_tokens"]
    manifest = conversation.manifest
    return {
        "answer": figures.pop("text"),
        "finish": figures.pop("finish"),
        "artifact": manifest.id if manifest else None,
        "document": manifest.document.uri if manifest else None,
        **figures,
        "bytes": conversation.bytes_stored,
        "bytes_full": conversation.bytes_full,
    }


def statistics(conversation: Conversation, exact: Reply | None) -> None:
    """What `/stats` prints.

    Args:
        exact: the last answer from the exact cache, if there was one.
    """
    context, reply = conversation.session.context, conversation.session.last_reply
    pairs = [
        ("prefix", f"{context.prefix_tokens:,} tokens"),
        ("tail", f"{len(context.ids) - context.prefix_tokens:,} tokens, {render.size(context.tail_bytes)}"),
        ("exact cache of the prefix", render.size(conversation.bytes_full)),
    ]
    if conversation.manifest is not None:
        less = conversation.bytes_full / conversation.bytes_stored
        stored = f"{render.size(conversation.bytes_stored)}, {less:.1f}x less"
        pairs.append((f"artifact {conversation.manifest.id[:12]}", stored))
    if reply is not None:
        pairs += [
            ("last prompt", f"{reply.prompt_tokens:,} tokens, {reply.cached_tokens:,} of them cached"),
            ("last answer", _speed(reply)),
            ("rebuilt for each token", f"{reply.rebuilt_tokens:,.0f} of {context.prefix_tokens:,} tokens"),
        ]
    if exact is not None:
        pairs.append(("last exact answer", _speed(exact)))
    render.rows("", pairs)


def printable(text: str) -> str:
    """Text without what could command a terminal: a model may say anything."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _speed(reply: Reply) -> str:
    return (
        f"{reply.generated_tokens} tokens in {reply.seconds:.2f} s, the first after "
        f"{reply.first_token_seconds:.2f} s, then {reply.tokens_per_second:.1f} tokens/s"
    )
