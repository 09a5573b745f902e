"""Counting words: RULER's aggregation tasks (arXiv 2404.06654, section 3.3), worded anew.

`cwe`, common words: a numbered list of words in which ten come up often and all others seldom; which ten?
`fwe`, frequent words: coded words whose frequencies follow a zeta distribution; which three come up most?
Both ask one question about a document: there is only one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import repeat
from random import Random

from xkv_service.demo import names
from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.tasks.base import Question, Room, Sample, Scoring
from xkv_service.evaluation.tasks.distinct import Distinct
from xkv_service.evaluation.tasks.sizing import Hay, fit

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class CommonWords:
    """Name the `common` words of a list that come up most often; a short solved list stands before it.

    A common word comes up 30 times and any other 3 times, in the example 10 and 3 times. Where that does not
    fit (by most tokenizers under 4,096 tokens), 6 times and once, in the example 3 times and once. Words are
    of two parts ("amber-falcon"): there must be thousands.
    """

    name: str = "cwe"
    common: int = 10
    scoring: Scoring = "all"
    reply_tokens: int = 160
    most_questions: int | None = 1

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """See `Task`."""
        state = rng.getstate()
        try:
            return self._make(rng, room, (30, 3), (10, 3, 20))
        except InvalidSpec:
            rng.setstate(state)
            return self._make(rng, room, (6, 1), (3, 1, 10))

    def _make(
        self, rng: Random, room: Room, times: tuple[int, int], example_times: tuple[int, int, int]
    ) -> Sample:
        often, seldom = times
        distinct = Distinct(rng)
        example = self._example(distinct, *example_times)
        chosen = [distinct.draw(_two_words) for _ in range(self.common)]
        others = Hay(distinct.draw(_two_words) for _ in repeat(None))
        order = rng.random()
        asked = (self._question(chosen),)

        def build(units: int) -> Sample:
            text = _numbered(chosen * often + others.first(units) * seldom, order)
            return Sample(f"{example}\n\n{self._introduction()}\n\n{text}", asked)

        return fit(self.name, build, room, self.reply_tokens)

    def _introduction(self) -> str:
        return f"In the numbered list below {self.common} words come up more often than all others."

    def _question(self, chosen: list[str]) -> Question:
        text = f"Which {self.common} words come up most often in the list?"
        return Question(text, tuple(chosen), "The words that come up most often are")

    def _example(self, distinct: Distinct, often: int, seldom: int, others: int) -> str:
        chosen = [distinct.draw(_two_words) for _ in range(self.common)]
        rest = [distinct.draw(_two_words) for _ in range(others)]
        text = _numbered(chosen * often + rest * seldom, distinct.rng.random())
        question = self._question(chosen)
        solved = f"{question.text}\n{question.answer_prefix} {', '.join(chosen)}."
        return f"An example first. {self._introduction()}\n\n{text}\n\n{solved}\n\nNow the list itself."


@dataclass(frozen=True)
class FrequentWords:
    """Name the `common` most frequent words of a coded text, dots left out.

    The word of rank k makes up k^-2 / zeta(2) of the text; rank 1 are the dots.
    """

    name: str = "fwe"
    common: int = 3
    scoring: Scoring = "all"
    reply_tokens: int = 50
    most_questions: int | None = 1

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """See `Task`."""
        distinct = Distinct(rng)
        vocabulary = ["....", *(distinct.draw(_coded_word) for _ in range(max(20, room.tokens // 50)))]
        order = rng.random()
        text = f"Which {self.common} words come up most often in the coded text, dots left out?"
        expected = tuple(vocabulary[1 : self.common + 1])
        asked = (Question(text, expected, "The words that come up most often are"),)
        introduction = "The text below is written in code. Count how often each of its words comes up."

        def build(units: int) -> Sample:
            return Sample(f"{introduction}\n\n{_coded_text(vocabulary, units, order)}", asked)

        return fit(self.name, build, room, self.reply_tokens)


def _numbered(words: list[str], order: float) -> str:
    Random(order).shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _coded_text(vocabulary: list[str], units: int, order: float) -> str:
    """At least one word of each rank that the question is about, about 10 more words a unit."""
    count = 10 * units + 60
    zeta = math.pi**2 / 6
    words = [word for rank, word in enumerate(vocabulary, 1) for _ in range(round(count / (zeta * rank**2)))]
    Random(order).shuffle(words)
    return " ".join(words)


def _two_words(rng: Random) -> str:
    return names.adjective_noun(rng, "-")


def _coded_word(rng: Random) -> str:
    return "".join(rng.choices(_LETTERS, k=6))
