"""Find the text in an artifact's tokens: an artifact does not carry its document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.prompts import apply_template
from xkv_service.sessions.rendering import ChatRenderer, Messages

# Stand in for texts in a rendered template, to see what is written around them.
_SYSTEM, _USER = "qzsystemqz", "qzuserqz"
_PROBES = ("What?", "1", " x")


def recover_renderer(tokenizer: Any, prefix_ids: list[int], system_prompt: str | None = None) -> ChatRenderer:
    """A renderer whose conversations start with `prefix_ids`, token by token.

    Its document lacks what the prefix lacks: the few tokens at the end that depend on the question.

    Args:
        system_prompt: the one that the prefix was made with; None: none, or one that is found as well.

    Raises:
        InvalidPrompt: the text does not come back exactly.
    """
    for renderer in _candidates(tokenizer, prefix_ids, system_prompt):
        if _renders(renderer, prefix_ids):
            return renderer
    raise InvalidPrompt(
        "the text of this artifact's document does not come back from its tokens",
        hint="give the document with --doc, with the system prompt and template it was precomputed with",
    )


def _candidates(tokenizer: Any, prefix_ids: list[int], system_prompt: str | None) -> Iterator[ChatRenderer]:
    text = _text(tokenizer, prefix_ids)
    if getattr(tokenizer, "chat_template", None):
        yield from _chats(tokenizer, text, system_prompt)
    plain = ChatRenderer(tokenizer, template="raw", system_prompt=system_prompt)
    opening = _text(tokenizer, plain.prompt_ids([_message("system", _USER)])).split(_USER)[0]
    if text.startswith(opening):
        yield ChatRenderer(tokenizer, text.removeprefix(opening), system_prompt, "raw")


def _chats(tokenizer: Any, text: str, system_prompt: str | None) -> Iterator[ChatRenderer]:
    system = [] if system_prompt is None else [_message("system", system_prompt)]
    opening, found, _ = _template(tokenizer, [*system, _message("user", _USER)]).partition(_USER)
    if found and text.startswith(opening):
        yield ChatRenderer(tokenizer, text.removeprefix(opening), system_prompt)
    if system_prompt is not None:
        return
    both = _template(tokenizer, [_message("system", _SYSTEM), _message("user", _USER)])
    opening, found, rest = both.partition(_SYSTEM)
    between = rest.split(_USER)[0]
    if found and between and text.startswith(opening):
        said, found, document = text.removeprefix(opening).partition(between)
        if found:
            yield ChatRenderer(tokenizer, document, said)


def _renders(renderer: ChatRenderer, prefix_ids: list[int]) -> bool:
    try:
        prompts = [renderer.prompt_ids([_message("user", probe)]) for probe in _PROBES]
    except InvalidPrompt:
        return False
    return all(prompt[: len(prefix_ids)] == prefix_ids for prompt in prompts)


def _template(tokenizer: Any, messages: Messages) -> str:
    """The template's text, or nothing where it takes no such messages."""
    try:
        return str(apply_template(tokenizer, messages, tokenize=False))
    except InvalidPrompt:
        return ""


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
