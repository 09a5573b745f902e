"""A document comes back from an artifact's tokens so that every chat starts with them, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from test_prompts import DOCUMENT, NO_SYSTEM, PLAIN, QUESTIONS, TEMPLATES, make_tokenizer

from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.prompts import Template, render_prefix
from xkv_service.sessions.recovering import recover_renderer

OTHERS = {
    "a system prompt of its own": "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    + PLAIN,
    "no system prompt": NO_SYSTEM,
    "system prompt in the first turn": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}"
        "{% set rest = messages %}{% endif %}{% for m in rest %}<|{{ m.role }}|>"
        "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    ),
}
TEXTS = [DOCUMENT, "# 漢字\n\n" + DOCUMENT, "Code: 48213 🙂 déjà " * 6]


def _check(tokenizer: Any, ids: list[int], given: str | None) -> None:
    renderer = recover_renderer(tokenizer, ids, given)
    for question in (question for question in QUESTIONS if "<|" not in question):
        for messages in ([], [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]):
            prompt = renderer.prompt_ids([*messages, {"role": "user", "content": question}])
            assert prompt[: len(ids)] == ids, question


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", [*TEMPLATES, *OTHERS])
@pytest.mark.parametrize("kind", ["words", "anything"])
@pytest.mark.parametrize("system_prompt", [None, "Answer in one word."])
def test_chats_start_with_the_artifacts_tokens(
    text: str, template: str, kind: str, system_prompt: str | None
) -> None:
    if template == "no system prompt" and system_prompt is not None:
        pytest.skip("refused when it is compressed")
    tokenizer = make_tokenizer({**TEMPLATES, **OTHERS}[template], kind)
    try:
        ids = render_prefix(tokenizer, text, system_prompt=system_prompt)
    except InvalidPrompt:
        pytest.skip("refused when it is compressed")
    _check(tokenizer, ids, None)
    _check(tokenizer, ids, system_prompt)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["unigram", "closing"])
def test_tokenizers_that_lose_text_give_the_tokens_or_an_error(template: str, kind: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[template], kind)
    ids = render_prefix(tokenizer, DOCUMENT)
    try:
        recover_renderer(tokenizer, ids)
    except InvalidPrompt as error:
        assert "--doc" in error.hint
        return
    _check(tokenizer, ids, None)


@pytest.mark.parametrize("kind", ["words", "anything"])
@pytest.mark.parametrize("chat_template", [PLAIN, None])
def test_raw_text_comes_back_as_raw_text(kind: str, chat_template: str | None) -> None:
    tokenizer = make_tokenizer(chat_template, kind)
    raw: Template = "raw"
    ids = render_prefix(tokenizer, DOCUMENT, template=raw)
    renderer = recover_renderer(tokenizer, ids)
    assert renderer.template == "raw" and DOCUMENT.startswith(str(renderer.document))
    _check(tokenizer, ids, None)


def test_text_that_does_not_come_back_is_refused() -> None:
    """A token that is half a character in the middle: nothing that is typed gives these tokens."""
    tokenizer = make_tokenizer(PLAIN, "words")
    ids = render_prefix(tokenizer, DOCUMENT)
    half = tokenizer("漢", add_special_tokens=False).input_ids[:1]
    with pytest.raises(InvalidPrompt, match="does not come back") as caught:
        recover_renderer(tokenizer, [*ids[:9], *half, *ids[9:]])
    assert "--doc" in caught.value.hint
