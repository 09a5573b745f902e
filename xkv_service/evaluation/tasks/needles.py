"""Needles in a haystack: RULER's retrieval tasks (arXiv 2404.06654, section 3.1), worded anew.

Sentences that assign values to keys are hidden in a text; the question asks for the values of one key or of
several. The eight tasks differ in the haystack, in the number of keys, values and queries, and in what keys
and values look like, as in the paper's table of configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from random import Random
from typing import Literal

from xkv_service.demo import names
from xkv_service.evaluation.tasks.base import Question, Room, Sample, Scoring
from xkv_service.evaluation.tasks.distinct import Distinct
from xkv_service.evaluation.tasks.haystack import Haystack, passage, scatter
from xkv_service.evaluation.tasks.sizing import Hay, fit

Values = dict[str, list[str]]


def _word(rng: Random) -> str:
    return names.adjective_noun(rng, "-")


def _number(rng: Random) -> str:
    return names.digits(rng, 7)


@dataclass(frozen=True)
class NeedleTask:
    """One retrieval task.

    Attributes:
        essay: the haystack of prose.
        hay: "noise" repeats one passage, "essay" is prose, "needles" is full of needles that nobody asks for.
        noun: how questions call a value.
        keys: keys hidden for one question; every further question about the document hides `queries` more.
        values: values of each key.
        queries: keys that one question asks for.
        draw_key, draw_value: draw them.
    """

    name: str
    essay: Haystack
    hay: Literal["noise", "essay", "needles"]
    noun: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    draw_key: Callable[[Random], str] = _word
    draw_value: Callable[[Random], str] = _number

    scoring: Scoring = "all"
    reply_tokens: int = 128
    most_questions: int | None = None

    def make(self, rng: Random, room: Room, questions: int) -> Sample:
        """See `Task`."""
        distinct = Distinct(rng)
        secrets = {
            distinct.draw(self.draw_key): [distinct.draw(self.draw_value) for _ in range(self.values)]
            for _ in range(self.keys + (questions - 1) * self.queries)
        }
        needles = [self._needle(key, value) for key, values in secrets.items() for value in values]
        depths = [rng.random() for _ in needles]
        hay = Hay(self._hay(distinct))
        joint = " " if self.hay == "essay" else "\n"
        asked = tuple(self._questions(rng, secrets, questions))

        def build(units: int) -> Sample:
            text = joint.join(scatter(needles, hay.first(units), depths))
            return Sample(f"{self._introduction()}\n\n{text}", asked)

        return fit(self.name, build, room, self.reply_tokens)

    def _hay(self, distinct: Distinct) -> Iterator[str]:
        if self.hay == "noise":
            return passage(distinct.rng)
        if self.hay == "essay":
            return self.essay(distinct.rng)
        return (
            self._needle(distinct.draw(self.draw_key), distinct.draw(self.draw_value)) for _ in repeat(None)
        )

    def _introduction(self) -> str:
        return (
            f"In the text below, {self.noun}s are assigned to names. Read all of it and note which "
            f"{self.noun} goes with which name: this is what the questions will be about."
        )

    def _needle(self, key: str, value: str) -> str:
        article = "An" if self.noun[0] in "aeiou" else "A"
        return f"{article} {self.noun} assigned to {key} is {value}."

    def _questions(self, rng: Random, secrets: Values, count: int) -> Iterator[Question]:
        keys = rng.sample(sorted(secrets), count * self.queries)
        for start in range(0, len(keys), self.queries):
            chosen = keys[start : start + self.queries]
            expected = tuple(value for key in chosen for value in secrets[key])
            listed = chosen[0] if len(chosen) == 1 else f"{', '.join(chosen[:-1])} and {chosen[-1]}"
            if len(expected) == 1:
                text = f"Which {self.noun} does the text assign to {listed}?"
                prefix = f"The {self.noun} assigned to {listed} is"
            else:
                text = f"Which {self.noun}s does the text assign to {listed}? Name every one of them."
                prefix = f"The {self.noun}s assigned to {listed} are"
            yield Question(text, expected, prefix)


def needle_tasks(essay: Haystack) -> list[NeedleTask]:
    """RULER's eight retrieval tasks over a haystack of prose."""
    uuid = names.uuid
    return [
        NeedleTask("niah_single_1", essay, "noise"),
        NeedleTask("niah_single_2", essay, "essay"),
        NeedleTask("niah_single_3", essay, "essay", "identifier", draw_value=uuid),
        NeedleTask("niah_multikey_1", essay, "essay", keys=4),
        NeedleTask("niah_multikey_2", essay, "needles"),
        NeedleTask("niah_multikey_3", essay, "needles", "identifier", draw_key=uuid, draw_value=uuid),
        NeedleTask("niah_multivalue", essay, "essay", values=4),
        NeedleTask("niah_multiquery", essay, "essay", keys=4, queries=4),
    ]
