"""What is bundled: small shards, plain Transformers loading, an example corpus with its questions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xkv_service.demo import demo_model_path

EXAMPLES = Path(__file__).parents[3] / "examples"
CORPUS = sorted((EXAMPLES / "corpus").iterdir())
MEGABYTE = 10**6


def _questions(document: Path) -> list[dict[str, str]]:
    file = EXAMPLES / "questions" / f"{document.stem}.questions.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_weights_are_small() -> None:
    sizes = [file.stat().st_size for file in demo_model_path().glob("*.safetensors")]
    assert max(sizes) < 16 * MEGABYTE
    assert sum(sizes) < 32 * MEGABYTE


def test_the_model_is_a_llama_of_eight_layers(demo_model: Any) -> None:
    assert demo_model.config.model_type == "llama"
    assert demo_model.config.num_hidden_layers == 8
    assert demo_model.config.tie_word_embeddings


def test_naming_the_path_loads_nothing_heavy() -> None:
    code = "import sys; import xkv_service.demo as d; d.demo_model_path(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_corpus_is_of_the_promised_size(demo_tokenizer: Any) -> None:
    lengths = [len(demo_tokenizer(file.read_text(encoding="utf-8")).input_ids) for file in CORPUS]
    assert len(CORPUS) >= 12
    assert min(lengths) >= 500
    assert max(lengths) <= 8000


@pytest.mark.parametrize("document", CORPUS, ids=lambda file: file.stem)
def test_every_document_has_questions_it_answers(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    questions = _questions(document)
    assert len(questions) >= 10
    for line in questions:
        assert line.keys() == {"question", "answer", "kind"}
        for sentence in line["answer"].removesuffix(".").split(". The "):
            assert sentence.removeprefix("The ") in text


def test_the_corpus_is_made_by_its_command(tmp_path: Path) -> None:
    tool = EXAMPLES.parent / "tools" / "make_corpus.py"
    subprocess.run([sys.executable, str(tool), "--out", str(tmp_path)], check=True, capture_output=True)
    for folder in ("corpus", "questions"):
        made = {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        assert made == {file.name: file.read_bytes() for file in (EXAMPLES / folder).iterdir()}


def test_the_model_answers_in_raw_text_too(demo_model: Any, demo_tokenizer: Any) -> None:
    document = min(CORPUS, key=lambda file: file.stat().st_size)
    line = next(line for line in _questions(document) if line["kind"] == "fact")
    text = f"{document.read_text(encoding='utf-8')}\nQuestion: {line['question']}\nAnswer:"
    ids = torch.tensor([demo_tokenizer(text).input_ids])
    output = demo_model.generate(ids, max_new_tokens=60, do_sample=False)
    assert demo_tokenizer.decode(output[0, ids.shape[1] :]).startswith(f" {line['answer']}\n")
