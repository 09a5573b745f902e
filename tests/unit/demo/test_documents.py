"""Readable documents: the same from the same seed, and every question has exactly one answer in the text."""

from __future__ import annotations

import re
import subprocess
import sys
from random import Random

import pytest

from xkv_service.demo import layout
from xkv_service.demo.documents import Document, approximate_tokens, make_document


def _statements(document: Document) -> str:
    """The text with every statement's own capital, so that answers can be found in it."""
    return document.text.replace(" the ", " The ")


@pytest.mark.parametrize("kind", layout.KINDS)
def test_the_same_seed_writes_the_same_document(kind: layout.Kind) -> None:
    first, second = (make_document(Random("a seed"), 900, kind=kind) for _ in range(2))
    assert first == second
    assert make_document(Random("another"), 900, kind=kind) != first


def test_another_process_writes_the_same_document() -> None:
    code = (
        "from random import Random; from xkv_service.demo.documents import make_document;"
        "import hashlib; print(hashlib.sha256(repr(make_document(Random('p'), 600)).encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("seed", range(8))
def test_answers_restate_what_the_document_says(seed: int) -> None:
    document = make_document(Random(seed), 1500)
    text = _statements(document)
    assert document.questions
    for question in document.questions:
        for sentence in re.split(r"(?<=\.) (?=The )", question.answer.removesuffix(".") + "."):
            fact = sentence.removesuffix(".").replace(" the ", " The ")
            assert fact in text, question
        assert all(value in question.answer for value in question.values)


@pytest.mark.parametrize("seed", range(8))
def test_no_two_questions_ask_for_the_same(seed: int) -> None:
    document = make_document(Random(seed), 3000)
    facts = [q.answer.split(" is ")[0] for q in document.questions if q.kind != "list"]
    assert len(facts) == len(set(facts))
    for fact in facts:
        assert len(re.findall(f"[Tt]he {re.escape(fact[4:])} is ", document.text)) == 1


@pytest.mark.parametrize("tokens", [300, 2000, 8000])
def test_length_is_reached_but_not_passed(tokens: int) -> None:
    lengths = [approximate_tokens(make_document(Random(seed), tokens).text) for seed in range(10)]
    assert max(lengths) <= 1.06 * tokens
    assert sorted(lengths)[5] >= 0.7 * tokens


def test_all_kinds_of_questions_occur() -> None:
    kinds = {q.kind for seed in range(6) for q in make_document(Random(seed), 2000).questions}
    assert kinds == {"fact", "chain", "list"}


def test_a_chain_leads_from_key_to_key_to_the_value() -> None:
    chains = [
        q for seed in range(6) for q in make_document(Random(seed), 2000).questions if q.kind == "chain"
    ]
    for chain in chains:
        links = chain.answer.removesuffix(".").split(". The ")
        assert all(" is the same as the " in link for link in links[:-1])
        for link, following in zip(links, links[1:], strict=False):
            assert following.startswith(link.split(" is the same as the ")[1] + " is ")
        assert links[-1].endswith(f" is {chain.values[0]}")
