"""Render a conversation over a document as the tokens that its prefix begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.prompts import (
    SEPARATOR,
    Messages,
    Template,
    apply_template,
    refuse_special_tokens,
    render_prefix,
)

__all__ = ["ChatRenderer", "Messages", "Template"]


@dataclass(frozen=True)
class ChatRenderer:
    """Turns messages into token ids, always in the same way.

    Args:
        tokenizer: the model's.
        document: text that stands first in the first user message, a blank line behind it; None: no document.
        system_prompt: text of the system message; None: none, or one among the messages.
        template: "chat" for the tokenizer's chat template. "raw" for plain text: the document, then
            "Question: ..." and "Answer: ..." with blank lines between; a blank line ends an answer.
    """

    tokenizer: Any
    document: str | None = None
    system_prompt: str | None = None
    template: Template = "chat"

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, besides the model's own end tokens."""
        return (SEPARATOR,) if self.template == "raw" else ()

    def prefix_ids(self) -> list[int]:
        """The tokens that every conversation over the document starts with.

        Raises:
            InvalidPrompt: no document, or see `render_prefix`.
        """
        return render_prefix(
            self.tokenizer, self.document or "", system_prompt=self.system_prompt, template=self.template
        )

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids up to where the next answer begins.

        Raises:
            InvalidPrompt: a user message that is no Unicode text or has a special token in it, or messages
                that the template refuses.
        """
        for message in messages:
            if message["role"] != "assistant":
                _refuse_broken_text(message["content"])
                refuse_special_tokens(self.tokenizer, message["content"], "message")
        if self.template == "raw":
            return list(self.tokenizer(self._text(messages), verbose=False).input_ids)
        quiet = {"verbose": False}
        return list(
            apply_template(self.tokenizer, self._complete(messages), tokenize=True, tokenizer_kwargs=quiet)
        )

    def _complete(self, messages: Messages) -> Messages:
        """With the system prompt, and the document in the first user message."""
        complete = [dict(message) for message in messages]
        if self.document is not None:
            first = next((message for message in complete if message["role"] == "user"), None)
            if first is None:
                raise InvalidPrompt("no user message", hint="the document stands in the first user message")
            first["content"] = f"{self.document}{SEPARATOR}{first['content']}"
        if self.system_prompt is not None:
            complete.insert(0, {"role": "system", "content": self.system_prompt})
        return complete

    def _text(self, messages: Messages) -> str:
        parts = [part for part in (self.system_prompt, self.document) if part is not None]
        for message in messages:
            if message["role"] == "assistant":
                parts[-1] += f" {message['content']}"
            elif message["role"] == "user":
                parts.append(f"Question: {message['content']}\nAnswer:")
            else:
                parts.append(message["content"])
        return SEPARATOR.join(parts)


def _refuse_broken_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidPrompt("the message is not Unicode text", hint="type it in UTF-8") from None
