"""Exact match of the bundled model on its full cache: single questions, conversations, RULER-style tasks.

    python benchmarks/demo_model.py

Every document is one that training has never drawn. An answer counts when it is the expected one, character
for character, decoded greedily; in a conversation the model's own answers stay in its context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from report import Report, command
from transformers import DynamicCache

from xkv_service.demo import demo_model_path
from xkv_service.demo.documents import Document, Question, make_document
from xkv_service.demo.ruler_tasks import TASKS, make_task
from xkv_service.evaluation import Chat, Reply, accuracy, ask_each, ask_in_turn
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix

RESULT = Path(__file__).parent / "results" / "demo_model.json"
TURNS = 5


class Bench:
    """Makes documents, fills exact caches and asks."""

    def __init__(self, loaded: LoadedModel, seed: str, report: Report) -> None:
        self.loaded, self.seed, self.report = loaded, seed, report

    def count(self, text: str) -> int:
        """Return the number of tokens of ``text``."""
        return len(self.loaded.tokenizer(text, add_special_tokens=False).input_ids)

    def chat(self, text: str) -> Chat:
        """Prefill ``text`` exactly and open a chat on the cache."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids = render_prefix(tokenizer, text)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)
        return Chat(model, tokenizer, cache, ids, text)

    def documents(self, tokens: int, documents: int, questions: int) -> None:
        """Ask ``questions`` single questions about each document, then the same ones five in a row."""
        single: list[Reply] = []
        turns: list[Reply] = []
        asked: list[Question] = []
        for number in range(documents):
            rng = Random(f"{self.seed}/documents/{tokens}/{number}")
            document = _long_enough(lambda rng=rng: make_document(rng, tokens, self.count), questions)  # type: ignore[misc]
            chosen = rng.sample(document.questions, questions)
            chat = self.chat(document.text)
            single += ask_each(chat, _pairs(chosen))
            for start in range(0, questions, TURNS):
                turns += ask_in_turn(chat, _pairs(chosen[start : start + TURNS]))
            asked += chosen
            print(
                f"{tokens} {number + 1}/{documents} {accuracy(single):.4f} {accuracy(turns):.4f}",
                file=sys.stderr,
            )
        self._add("documents, single questions", tokens, documents, single)
        self._add(f"documents, {TURNS} questions in a row", tokens, documents, turns)
        for kind in ("fact", "chain", "list"):
            of_kind = [reply for reply, question in zip(single, asked, strict=True) if question.kind == kind]
            if of_kind:
                self._add(f"documents, single questions: {kind}", tokens, documents, of_kind)

    def ruler(self, task: str, tokens: int, haystacks: int) -> None:
        """Ask one question about each haystack of one task."""
        replies: list[Reply] = []
        for number in range(haystacks):
            rng = Random(f"{self.seed}/{task}/{tokens}/{number}")
            document = make_task(task, rng, tokens, self.count)
            replies += ask_each(self.chat(document.text), _pairs(document.questions[:1]))
        self._add(task, tokens, haystacks, replies)

    def _add(self, task: str, tokens: int, documents: int, replies: Sequence[Reply]) -> None:
        self.report.add(
            task=task,
            tokens=tokens,
            documents=documents,
            questions=len(replies),
            exact_match=round(accuracy(replies), 4),
        )


def _long_enough(make: Callable[[], Document], questions: int) -> Document:
    document = make()
    while len(document.questions) < questions:
        document = make()
    return document


def _pairs(questions: Sequence[Question]) -> list[tuple[str, str]]:
    return [(question.question, question.answer) for question in questions]


def main() -> None:
    """Run everything and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--documents", type=int, default=25, help="documents of each length")
    parser.add_argument("--questions", type=int, default=20, help="questions about each document")
    parser.add_argument("--ruler-lengths", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--haystacks", type=int, default=10, help="haystacks of each task and length")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--seed", default="benchmark")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = Report("demo_model", command(), "the expected answer, character for character")
    bench = Bench(load_model(arguments.model), arguments.seed, report)
    for tokens in arguments.lengths:
        bench.documents(tokens, arguments.documents, arguments.questions)
    for tokens in arguments.ruler_lengths:
        for task in TASKS:
            bench.ruler(task, tokens, arguments.haystacks)
    report.write(arguments.out)


if __name__ == "__main__":
    main()
