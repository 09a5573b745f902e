"""Variable tracking: RULER's multi-hop task (arXiv 2404.06654, section 3.2), worded anew.

A chain of assignments passes a number from variable to variable through a text of noise; the question asks
for all variables that hold it. A solved example stands before the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from xkv_service.demo import names
from xkv_service.evaluation.tasks.base import Question, Room, Sample, Scoring
from xkv_service.evaluation.tasks.distinct import Distinct
from xkv_service.evaluation.tasks.haystack import passage, scatter
from xkv_service.evaluation.tasks.sizing import Hay, fit

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_EXAMPLE_SENTENCES = 10
_INTRODUCTION = (
    "Between the sentences below, variables are set: one to a number, others to what a variable before them "
    "holds. Follow the settings from each to the next."
)


@dataclass(frozen=True)
class VariableTracking:
    """Follow chains of `hops` + 1 variables; each question about a document has a chain of its own."""

    name: str = "vt"
    hops: int = 4
    scoring: Scoring = "all"
    reply_tokens: int = 60
    most_questions: int | None = None

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """See `Task`."""
        distinct = Distinct(rng)
        example = self._example(distinct)
        chains = [self._chain(distinct) for _ in range(questions)]
        lines = [line for chain in chains for line in chain.lines]
        depths = [depth for _ in chains for depth in sorted(rng.random() for _ in range(self.hops + 1))]
        hay = Hay(passage(rng))
        asked = tuple(chain.question() for chain in chains)

        def build(units: int) -> Sample:
            text = "\n".join(scatter(lines, hay.first(units), depths))
            return Sample(f"{example}\n\n{_INTRODUCTION}\n\n{text}", asked)

        return fit(self.name, build, room, self.reply_tokens)

    def _chain(self, distinct: Distinct) -> _Chain:
        variables = tuple(distinct.draw(_variable) for _ in range(self.hops + 1))
        return _Chain(distinct.draw(_value), variables)

    def _example(self, distinct: Distinct) -> str:
        rng, chain = distinct.rng, self._chain(distinct)
        depths = sorted(rng.random() for _ in chain.lines)
        text = "\n".join(scatter(chain.lines, Hay(passage(rng)).first(_EXAMPLE_SENTENCES), depths))
        question = chain.question()
        solved = f"{question.text}\n{question.answer_prefix} {', '.join(chain.variables)}."
        return f"An example first. {_INTRODUCTION}\n\n{text}\n\n{solved}\n\nNow the text itself."


@dataclass(frozen=True)
class _Chain:
    """A number and the variables that hold it, in the order they are set."""

    value: str
    variables: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        sources = [self.value, *(f"VAR {variable}" for variable in self.variables)]
        return [
            f"VAR {variable} = {source}." for variable, source in zip(self.variables, sources, strict=False)
        ]

    def question(self) -> Question:
        text = f"Which {len(self.variables)} variables hold the number {self.value} in the end?"
        return Question(text, self.variables, f"The variables that hold {self.value} are")


def _value(rng: Random) -> str:
    return names.digits(rng, 5)


def _variable(rng: Random) -> str:
    return "".join(rng.choices(_LETTERS, k=5))
