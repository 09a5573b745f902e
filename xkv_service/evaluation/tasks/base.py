"""The interface of every task: documents, the questions about them, and what an answer is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

Scoring = Literal["all", "part", "exact"]
"""How a reply is scored, as RULER does (arXiv 2404.06654, section 4) for "all" and "part":

- "all": the share of the expected texts that the reply contains, in any case.
- "part": 1 if the reply contains one of the expected texts, in any case.
- "exact": 1 if the reply is the first expected text, character for character.
"""


@dataclass(frozen=True)
class Question:
    """One question about a document.

    Attributes:
        text: what the user asks, behind the document.
        expected: the texts that the reply is scored by.
        answer_prefix: how the reply is made to begin; not part of what is scored.
    """

    text: str
    expected: tuple[str, ...]
    answer_prefix: str = ""


@dataclass(frozen=True)
class Sample:
    """One document and the questions about it; every method sees exactly these."""

    document: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Room:
    """How long a sample may be, as the model counts.

    Attributes:
        tokens: the length asked for.
        measure: tokens of a text alone.
        prompt: tokens of a whole prompt: document, question, answer prefix and everything the template adds.
    """

    tokens: int
    measure: Callable[[str], int]
    prompt: Callable[[str, Question], int]


class Task(Protocol):
    """One task."""

    @property
    def name(self) -> str:
        """What the command line and results call it."""

    @property
    def scoring(self) -> Scoring:
        """How replies are scored."""

    @property
    def reply_tokens(self) -> int:
        """The longest reply."""

    @property
    def most_questions(self) -> int | None:
        """The most questions a document can be asked, or None for any number."""

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """Write one document with this many questions.

        Args:
            rng: the source of every choice; the same state gives the same sample.
            room: the length to reach and not to pass.
            questions: 1 to `most_questions`.

        Raises:
            InvalidSpec: nothing fits that length.
        """


def score(scoring: Scoring, expected: tuple[str, ...], reply: str) -> float:
    """What a reply is worth, 0 to 1."""
    if scoring == "exact":
        return float(reply == expected[0])
    said = reply.lower()
    found = [text.lower() in said for text in expected]
    return float(any(found)) if scoring == "part" else sum(found) / len(found)
