"""Asking on a cache: the bundled model answers, and a checked answer is the one that `generate` gives."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from xkv_service.demo.documents import Document, make_document
from xkv_service.errors import InvalidPrompt
from xkv_service.evaluation import Chat, Reply, accuracy, ask_each, ask_in_turn
from xkv_service.modeling.prompts import render_prefix


@pytest.fixture(scope="module")
def document() -> Document:
    return make_document(Random("evaluation"), 700)


def _chat(model: Any, tokenizer: Any, text: str, **options: Any) -> Chat:
    ids = render_prefix(
        tokenizer, text, system_prompt=options.get("system_prompt"), template=options.get("template", "chat")
    )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    return Chat(model, tokenizer, cache, ids, text, **options)


def _pairs(document: Document, count: int) -> list[tuple[str, str]]:
    return [(q.question, q.answer) for q in document.questions[:count]]


def test_the_bundled_model_answers(demo_model: Any, demo_tokenizer: Any, document: Document) -> None:
    chat = _chat(demo_model, demo_tokenizer, document.text)
    assert accuracy(ask_each(chat, _pairs(document, 8))) == 1.0
    assert accuracy(ask_in_turn(chat, _pairs(document, 8))) == 1.0


def test_decoding_gives_what_generate_gives(demo_model: Any, demo_tokenizer: Any, document: Document) -> None:
    question = document.questions[0].question
    messages = [{"role": "user", "content": f"{document.text}\n\n{question}"}]
    ids = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    output = demo_model.generate(ids, max_new_tokens=100, do_sample=False)
    wanted = demo_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    chat = _chat(demo_model, demo_tokenizer, document.text)
    assert chat.ask(question) == Reply(wanted, None)
    chat.restart()
    assert chat.ask(question, wanted) == Reply(wanted, True)
    chat.restart()
    assert chat.ask(question, wanted.replace("1", "2") + " Or so.") == Reply(wanted, False)


def test_the_models_own_answer_stays_in_its_context(
    demo_model: Any, demo_tokenizer: Any, document: Document
) -> None:
    (first, _), (second, answer) = _pairs(document, 2)
    chat = _chat(demo_model, demo_tokenizer, document.text, system_prompt="Answer the question.")
    said = chat.ask(first, "Something else.")
    assert said.right is False
    chat.ask(second, answer)
    held = demo_tokenizer.decode(chat.greedy.held)
    assert f"{first}<|end|><|assistant|>{said.text}<|end|><|user|>{second}" in held
    assert held.startswith("<|begin|><|system|>Answer the question.<|end|><|user|>#")


def test_plain_text_works_as_well(demo_model: Any, demo_tokenizer: Any, document: Document) -> None:
    chat = _chat(demo_model, demo_tokenizer, document.text, template="raw")
    pairs = _pairs(document, 5)
    assert accuracy(ask_each(chat, pairs)) == 1.0
    assert accuracy(ask_in_turn(chat, pairs)) == 1.0
    chat.restart()
    question, answer = pairs[0]
    assert chat.ask(question).text == answer


def test_an_answer_can_be_begun_and_cut_when_it_is_enough(
    demo_model: Any, demo_tokenizer: Any, document: Document
) -> None:
    question, answer = _pairs(document, 1)[0]
    begun, rest = answer[: len(answer) // 2].rsplit(" ", 1)[0], answer[len(answer) // 2 :].split(" ", 1)[1]
    chat = _chat(demo_model, demo_tokenizer, document.text)
    assert chat.ask(question, answer_prefix=begun).text.endswith(rest)
    assert chat.turns[0].reply == answer
    chat.restart()
    cut = chat.ask(question, answer_prefix=begun, enough=lambda text: len(text) > 3).text
    assert 3 < len(cut) < len(answer) - len(begun)


def test_restart_leaves_only_the_prefix(demo_model: Any, demo_tokenizer: Any, document: Document) -> None:
    chat = _chat(demo_model, demo_tokenizer, document.text)
    before = chat.greedy.cache.get_seq_length()
    ask_in_turn(chat, _pairs(document, 3))
    assert chat.greedy.cache.get_seq_length() > before
    chat.restart()
    assert chat.greedy.cache.get_seq_length() == before


def test_an_answer_may_be_cut_short(demo_model: Any, demo_tokenizer: Any, document: Document) -> None:
    chat = _chat(demo_model, demo_tokenizer, document.text, max_new_tokens=2)
    assert document.questions[0].answer.startswith(chat.ask(document.questions[0].question).text)


def test_another_documents_cache_is_refused(demo_model: Any, demo_tokenizer: Any, document: Document) -> None:
    chat = _chat(demo_model, demo_tokenizer, document.text)
    chat.document = "Another text, of some length, that the cache does not hold."
    with pytest.raises(InvalidPrompt, match="does not start with the tokens in the cache"):
        chat.ask("What is it?")


def test_no_replies_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="no replies"):
        accuracy([])
