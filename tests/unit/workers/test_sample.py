"""From documents and questions to probes, with a tokenizer of bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.evaluation.rendering import Renderer
from xkv_workers.corpus import Rejected, list_files
from xkv_workers.errors import BadDocument
from xkv_workers.sample import MOST_QUESTIONS, Sampling, read_questions


@pytest.fixture
def sampling(tiny_model: Path, tmp_path: Path) -> Sampling:
    (tmp_path / "questions").mkdir()
    return Sampling(Renderer(AutoTokenizer.from_pretrained(tiny_model)), tmp_path / "questions", 400)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("The keys are kept by the porter. " * 4)
    return tmp_path / "a.txt"


def ask(sampling: Sampling, *lines: object) -> None:
    assert sampling.questions is not None
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (sampling.questions / "a.questions.jsonl").write_text(text)


def only(sampling: Sampling, path: Path) -> ProbedPrefix | Rejected:
    (found,) = sampling.read(list_files([path]))
    return found


def test_a_question_and_its_answer_follow_the_prefix(sampling: Sampling, document: Path) -> None:
    ask(sampling, {"question": "Who?", "answer": "The porter.", "kind": "fact"})
    found = only(sampling, document)
    assert isinstance(found, ProbedPrefix)
    (probe,) = found.probes
    tokenizer = sampling.renderer.tokenizer
    text = tokenizer.decode([*found.token_ids, *probe.token_ids])
    assert text == f"<|user|>{document.read_text()}\n\nWho?<|end|><|assistant|>The porter."
    assert list(found.token_ids) == sampling.renderer.prefix(document.read_text())
    assert probe.counted == len("The porter.") + 1


def test_without_questions_the_end_of_the_document_is_the_probe(sampling: Sampling, document: Path) -> None:
    prefix = sampling.renderer.prefix(document.read_text())
    for one in (sampling, replace(sampling, questions=None)):
        found = only(one, document)
        assert found == ProbedPrefix.of_text("a.txt", prefix)


def test_no_more_questions_than_needed_are_read(sampling: Sampling, document: Path) -> None:
    ask(sampling, *({"question": f"{number}?", "answer": "Yes."} for number in range(20)))
    found = only(sampling, document)
    assert isinstance(found, ProbedPrefix) and len(found.probes) == MOST_QUESTIONS


def test_a_document_that_leaves_no_room_is_refused(sampling: Sampling, document: Path) -> None:
    ask(sampling, {"question": "Who?" * 100, "answer": "Yes."})
    found = only(sampling, document)
    assert isinstance(found, Rejected) and "too long" in found.reason


@pytest.mark.parametrize("line", ["text", [1], {"question": "Who?"}, {"question": 1, "answer": "x"}, {}])
def test_a_line_that_is_no_question_is_told(sampling: Sampling, document: Path, line: object) -> None:
    ask(sampling, {"question": "Who?", "answer": "Ann."}, line)
    found = only(sampling, document)
    assert isinstance(found, Rejected)
    assert "a.questions.jsonl, line 2 is no question" in found.reason


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.questions.jsonl"
    for content in (b"\xff\xfe\n", b"{" * 100_000, b"[" * 60_000):
        path.write_bytes(content)
        with pytest.raises(BadDocument, match="line 1 is no question"):
            read_questions(path)
