"""Training rows: token for token what the chat template gives, with the answers marked."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from demo_training.batches import Shape, collate, copy_row, fact_row
from demo_training.rendering import Renderer, Row
from demo_training.tokenizer import load_tokenizer

from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import Document, make_document


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer(demo_model_path()))


@pytest.fixture(scope="module")
def document() -> Document:
    return make_document(Random("rendering"), 700)


def _messages(document: Document, count: int, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for i, question in enumerate(document.questions[:count]):
        text = question.question if i else f"{document.text}\n\n{question.question}"
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": question.answer}]
    return messages


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_a_chat_row_is_what_the_template_renders(
    renderer: Renderer, document: Document, demo_tokenizer: Any, system: str | None
) -> None:
    row = renderer.chat(document.text, document.questions[:3], 10_000, system)
    ids = demo_tokenizer.apply_chat_template(_messages(document, 3, system), return_dict=False)
    assert row.ids == ids


def test_a_raw_row_is_what_the_tokenizer_encodes(
    renderer: Renderer, document: Document, demo_tokenizer: Any
) -> None:
    row = renderer.raw(document.text, document.questions[:2], 10_000)
    parts = [f"Question: {q.question}\nAnswer: {q.answer}\n\n" for q in document.questions[:2]]
    assert row.ids == demo_tokenizer(f"{document.text}\n\n{''.join(parts)}").input_ids


def test_answers_are_marked(renderer: Renderer, document: Document, demo_tokenizer: Any) -> None:
    row = renderer.chat(document.text, document.questions[:3], 10_000)
    for number, question in enumerate(document.questions[:3], 1):
        marked = [token for token, answer in zip(row.ids, row.answers, strict=True) if answer == number]
        assert demo_tokenizer.decode(marked) == question.answer + "<|end|>"


def test_questions_that_do_not_fit_are_left_out(renderer: Renderer, document: Document) -> None:
    whole = renderer.chat(document.text, document.questions, 10_000)
    cut = renderer.chat(document.text, document.questions, 900)
    assert len(cut.ids) <= 900 < len(whole.ids)
    assert 0 < len(cut.kinds) < len(whole.kinds)


def test_a_row_longer_than_the_batch_marks_nothing() -> None:
    row = Row()
    row.context([7] * 20)
    row.answer([8] * 20, "fact")
    batch = collate([row], Shape(1, 24))
    assert batch.ids[0].tolist() == [7] * 20 + [8] * 4
    assert not batch.answers.any()
    assert (batch.kinds == -1).all()


def test_rows_keep_to_their_length(renderer: Renderer) -> None:
    for seed in range(30):
        row = fact_row(Random(seed), renderer, 1024, ruler_share=0.5)
        assert len(row.ids) == len(row.answers)
        assert max(row.answers) == len(row.kinds)
        assert len(row.ids) <= 1024 or not row.kinds


def test_a_copy_row_repeats_itself() -> None:
    import numpy as np

    row = copy_row(np.random.default_rng(0), 256, 2048)
    said = row.answers.index(1)
    assert row.ids[said:] == row.ids[2 : len(row.ids) - said + 2]
