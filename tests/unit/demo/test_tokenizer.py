"""The bundled tokenizer: any text, digits apart, pieces that add up, and the chat template."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import make_document


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(demo_tokenizer: Any, text: str) -> None:
    if any(token in text for token in demo_tokenizer.all_special_tokens):
        return
    assert demo_tokenizer.decode(_encode(demo_tokenizer, text)) == text


@pytest.mark.parametrize("text", ["48213", "room 4.17", "3f9a-07b2", "in 1999, 12:45"])
def test_each_digit_is_one_token(demo_tokenizer: Any, text: str) -> None:
    tokens = [demo_tokenizer.decode([token]) for token in _encode(demo_tokenizer, text)]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize("seed", range(5))
def test_encoding_piece_by_piece_gives_the_tokens_of_the_whole(demo_tokenizer: Any, seed: int) -> None:
    document = make_document(Random(seed), 800)
    question = document.questions[0]
    pieces = [
        document.text,
        "\n\n" + question.question,
        "\nAnswer:",
        f" {question.answer}\n\n",
        "Question: ?",
    ]
    apart = [token for piece in pieces for token in _encode(demo_tokenizer, piece)]
    assert apart == _encode(demo_tokenizer, "".join(pieces))


def test_the_chat_template_writes_turns(demo_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A text.\n\nA question?"},
        {"role": "assistant", "content": "An answer."},
        {"role": "user", "content": "Another?"},
    ]
    text = demo_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>A text.\n\nA question?<|end|>"
        "<|assistant|>An answer.<|end|><|user|>Another?<|end|><|assistant|>"
    )


def test_the_chat_template_refuses_unknown_roles(demo_tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="Unknown role tool"):
        demo_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_makes_the_bundled_tokenizer(tmp_path: Path) -> None:
    from demo_training.tokenizer import train_tokenizer

    train_tokenizer(seed=0, vocabulary=2048).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (demo_model_path() / "tokenizer.json").read_bytes()
