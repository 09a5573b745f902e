"""Questions about many passages: RULER's question answering (arXiv 2404.06654, section 3.4), worded anew.

RULER hides the passage that answers a question of SQuAD or HotpotQA among others of the same data set. Here
the data are a file in SQuAD's JSON format, or, without one, short notes that this module writes about the
things of the demo's documents: single facts, easier than SQuAD; no figure of RULER's compares with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Any

from xkv_service.demo import names, prose
from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.tasks.base import Question, Room, Sample, Scoring
from xkv_service.evaluation.tasks.sizing import Hay, fit

_INTRODUCTION = "The passages below are numbered. One of them holds the answer to each question."
_REQUEST = "Answer with as few words as you can."


@dataclass(frozen=True)
class Passage:
    """A text and questions that it alone answers, each with every answer that counts."""

    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


Passages = Callable[[Random], Iterator[Passage]]
"""Draws different passages in random order; the first ones have questions."""


@dataclass(frozen=True)
class Reading:
    """Find the passage that answers a question; each question about a document has a passage of its own."""

    passages: Passages
    name: str = "qa"
    scoring: Scoring = "part"
    reply_tokens: int = 32
    most_questions: int | None = None

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """See `Task`.

        Raises:
            InvalidSpec: the data have too few passages for this length or this many questions.
        """
        drawn = self.passages(rng)
        asked = [passage for passage, _ in zip(drawn, range(questions), strict=False)]
        if len(asked) < questions or not all(passage.questions for passage in asked):
            raise InvalidSpec(
                f"the question data have no {questions} passages with questions",
                hint="give a larger file, or ask fewer questions about each document",
            )
        pairs = tuple(_question(*rng.choice(passage.questions)) for passage in asked)
        places = [rng.random() for _ in asked]
        others = Hay(passage.text for passage in drawn)

        def build(units: int) -> Sample:
            texts = others.first(units)
            for place, passage in zip(places, asked, strict=True):
                texts.insert(round(place * len(texts)), passage.text)
            listed = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
            return Sample(f"{_INTRODUCTION}\n\n{listed}", pairs)

        return fit(self.name, build, room, self.reply_tokens, others)


def _question(text: str, answers: tuple[str, ...]) -> Question:
    return Question(f"{text} {_REQUEST}", answers, "The answer is")


def written_notes(rng: Random) -> Iterator[Passage]:
    """Notes about offices, people and projects: a few facts each, among sentences of prose."""
    known: set[str] = set()
    for _ in repeat(None):
        subject = rng.choice(names.SUBJECTS)
        entity = subject.draw(rng)
        if entity in known:
            continue
        known.add(entity)
        chosen = rng.sample(subject.attributes, min(3, len(subject.attributes)))
        facts = [(f"{name} of {entity}", draw(rng)) for name, draw in chosen]
        sentences = [f"The {key} is {value}." for key, value in facts]
        sentences += [prose.sentence(rng) for _ in range(rng.randint(1, 4))]
        rng.shuffle(sentences)
        yield Passage(" ".join(sentences), tuple((f"What is the {key}?", (value,)) for key, value in facts))


def read_squad(path: Path) -> Passages:
    """Passages of a file in SQuAD's JSON format (versions 1.1 and 2.0; unanswerable questions left out).

    Raises:
        InvalidSpec: the file cannot be read or is not in that format.
    """
    try:
        passages = [
            _passage(paragraph)
            for article in json.loads(path.read_text("utf-8"))["data"]
            for paragraph in article["paragraphs"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidSpec(
            f"{path} is no question data: {type(error).__name__}: {error}",
            hint="give a file in SQuAD's JSON format: data, paragraphs, context, qas, answers",
        ) from None
    if not any(passage.questions for passage in passages):
        raise InvalidSpec(f"{path} has no question with an answer", hint="give another file")

    def draw(rng: Random) -> Iterator[Passage]:
        shuffled = rng.sample(passages, len(passages))
        return iter(sorted(shuffled, key=lambda passage: not passage.questions))

    return draw


def _passage(paragraph: dict[str, Any]) -> Passage:
    questions = []
    for asked in paragraph["qas"]:
        answers = tuple(dict.fromkeys(str(answer["text"]) for answer in asked["answers"]))
        if answers and not asked.get("is_impossible", False):
            questions.append((str(asked["question"]), answers))
    return Passage(str(paragraph["context"]), tuple(questions))
