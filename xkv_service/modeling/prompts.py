"""Turn a document into the tokens that every later chat about it starts with.

A chat about a document has the messages `[system, user: document + "\\n\\n" + question, ...]`. Its tokens are
made by the model's own chat template and tokenizer, which may merge, strip or add text around the document's
end. So the stable prefix is found by rendering many chats and keeping the tokens they all begin with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from xkv_artifacts.errors import first_line
from xkv_service.errors import InvalidPrompt

Template = Literal["chat", "raw"]
Messages = list[dict[str, str]]

SEPARATOR = "\n\n"

# Beginnings that tokenizers treat differently: letters, digits, spaces, newlines, punctuation, other scripts.
_QUESTIONS = (
    "What?",
    "1",
    " x",
    "  2",
    "\n",
    "\n\n\nA",
    "\t",
    "!",
    "'s",
    ")",
    "_a",
    "#",
    "$5",
    "ß",
    "漢",
    "か",
    "ع",
    "🙂",
)
# Directly behind the document: the prefix must not reach past its end.
_CLOSE = ("", "x", " x", "1", ".", "\n", ",\n", "漢")
_FOLLOW_UPS = ("And then?", "\n2")
_ANSWER = "It is so."

# Stands in for the clock that Transformers gives to templates.
_ANOTHER_CLOCK = "{%- macro strftime_now(form) -%}31 December 1999{%- endmacro -%}"

_LONG_DOCUMENT = 6000
_ENDING = 2000
_MOST_UNSTABLE = 64
_MOST_MERGED = 16


def render_prefix(
    tokenizer: Any, document: str, *, system_prompt: str | None = None, template: Template = "chat"
) -> list[int]:
    """Token ids that every chat about `document` starts with.

    Args:
        tokenizer: the model's tokenizer.
        document: text; its end may lose a few tokens that depend on the question.
        system_prompt: text of the system message, or None for no system message. With "raw" it is put before
            the document, a blank line between.
        template: "chat" for the model's chat template, "raw" for plain text as the tokenizer encodes it.

    Raises:
        InvalidPrompt: an empty document or one with a special token in it, no chat template, or one that
            makes no stable prefix.
    """
    if not document.strip():
        raise InvalidPrompt("the document is empty", hint="give a document with text in it")
    refuse_special_tokens(tokenizer, document, "document")
    chat = _Chat(tokenizer, system_prompt, template)
    chat.check(document)
    if len(document) <= _LONG_DOCUMENT:
        ids, unstable = _stable_ids(chat, document)
    else:
        ids, unstable = _stable_ids_of_long(chat, document)
    other = chat.ids(("A" if document.lstrip()[0] != "A" else "B") + document[:100])
    nothing_left = len(ids) <= len(common_beginning([ids, other]))
    if unstable > (_MOST_MERGED if nothing_left else _MOST_UNSTABLE):
        raise InvalidPrompt(
            "the chat template changes text before the document's end as a chat goes on",
            hint="leave the system prompt out, or use --template raw",
        )
    if nothing_left:
        raise InvalidPrompt(
            "none of the document's tokens stays the same in every chat",
            hint="give a longer document, or use --template raw",
        )
    return ids


def check_template(tokenizer: Any, *, system_prompt: str | None = None, template: Template = "chat") -> None:
    """Refuse a tokenizer with which no document at all has a prefix. Arguments as `render_prefix`.

    Raises:
        InvalidPrompt: no chat template, or one that fails, takes no system prompt or begins with the date.
    """
    _Chat(tokenizer, system_prompt, template).check("A document.")


def refuse_special_tokens(tokenizer: Any, text: str, what: str) -> None:
    """Refuse a document or a message that could end its own turn and speak as somebody else.

    Raises:
        InvalidPrompt: a special token is in `text`; `what` names the text.
    """
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            raise InvalidPrompt(
                f"the {what} contains {token.content!r}, a special token of this model's tokenizer",
                hint=f"remove it from the text: a {what} could forge turns of the chat with it",
            )


def apply_template(tokenizer: Any, messages: Messages, **options: Any) -> Any:
    """The tokenizer's chat template over `messages`, up to where the next answer begins.

    Args:
        options: of `apply_chat_template`; `tokenize` says whether ids or a text come back.

    Raises:
        InvalidPrompt: the model has no chat template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidPrompt("this model has no chat template", hint="use --template raw")
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        if messages and messages[0]["role"] == "system" and _mentions_system(error):
            raise _no_system_prompt() from error
        raise InvalidPrompt(
            f"the chat template fails: {first_line(error)}", hint="use --template raw"
        ) from error


@dataclass(frozen=True)
class _Chat:
    """Renders chats about documents with one tokenizer, system prompt and template."""

    tokenizer: Any
    system_prompt: str | None
    template: Template

    def ids(self, content: str, follow_up: str | None = None) -> list[int]:
        """Token ids of a chat whose first user message is `content`."""
        if self.template == "raw":
            text = content if follow_up is None else f"{content}{SEPARATOR}{_ANSWER}{SEPARATOR}{follow_up}"
            text = text if self.system_prompt is None else f"{self.system_prompt}{SEPARATOR}{text}"
            return list(self.tokenizer(text, verbose=False).input_ids)
        quiet = {"verbose": False}
        return list(
            apply_template(
                self.tokenizer, self._messages(content, follow_up), tokenize=True, tokenizer_kwargs=quiet
            )
        )

    def check(self, document: str) -> None:
        """Refuse templates that cannot carry the messages, or that write the date before the document."""
        if self.template == "raw":
            return
        start = document.strip()[:200]
        text = apply_template(self.tokenizer, self._messages(start, None), tokenize=False)
        if self.system_prompt is not None and self.system_prompt.strip() not in text:
            raise _no_system_prompt()
        undated = _ANOTHER_CLOCK + self.tokenizer.get_chat_template()
        later = apply_template(
            self.tokenizer, self._messages(start, None), tokenize=False, chat_template=undated
        )
        common = common_beginning([text, later])
        if common != text and start not in common:
            raise InvalidPrompt(
                "the chat template writes today's date before the document: no chat of tomorrow would match",
                hint="use --template raw, or a chat template without a date",
            )

    def _messages(self, content: str, follow_up: str | None) -> Messages:
        messages = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        messages.append({"role": "user", "content": content})
        if follow_up is not None:
            messages.append({"role": "assistant", "content": _ANSWER})
            messages.append({"role": "user", "content": follow_up})
        return messages


def _stable_ids(chat: _Chat, document: str) -> tuple[list[int], int]:
    """Tokens that all probing chats begin with, and how many they lack to reach the document's end."""
    probes = [chat.ids(content) for content in _probe_contents(document)]
    probes += [chat.ids(document + SEPARATOR + _QUESTIONS[0], follow_up) for follow_up in _FOLLOW_UPS]
    reach = _reach(chat, document)
    stable = common_beginning([reach, *probes])
    return stable, len(reach) - len(stable)


def _stable_ids_of_long(chat: _Chat, document: str) -> tuple[list[int], int]:
    """As `_stable_ids`; most probes see the document's ending only, to tokenize a long text few times."""
    _, unstable = _stable_ids(chat, document[-_ENDING:])
    reach = _reach(chat, document)
    kept = reach[: max(0, len(reach) - unstable)]
    later_turn = chat.ids(document + SEPARATOR + _QUESTIONS[1], _FOLLOW_UPS[0])
    if common_beginning([kept, later_turn]) != kept:
        return _stable_ids(chat, document)
    return kept, unstable


def _reach(chat: _Chat, document: str) -> list[int]:
    """Tokens up to about the document's end."""
    ids: list[int] = common_beginning(
        [chat.ids(document + text) for text in ("x", SEPARATOR + _QUESTIONS[0])]
    )
    return ids


def _probe_contents(document: str) -> Iterable[str]:
    for question in _QUESTIONS:
        yield document + SEPARATOR + question
    for text in _CLOSE:
        yield document + text


def common_beginning(sequences: Sequence[Any]) -> Any:
    """The longest common prefix of lists or strings."""
    shortest = min(sequences, key=len)
    for index, item in enumerate(shortest):
        if any(other[index] != item for other in sequences):
            return shortest[:index]
    return shortest


def _no_system_prompt() -> InvalidPrompt:
    return InvalidPrompt(
        "this model's chat template takes no system prompt",
        hint="leave the system prompt out, or write it at the top of the document",
    )


def _mentions_system(error: Exception) -> bool:
    return "system" in str(error).lower()
