"""Readable documents full of similar facts, with the questions they answer.

A document is a register, a handbook, a notice board or the minutes of a meeting. Its facts read "The
access code of the Lisbon office is 48213."; a question asks for one of them and its answer restates the fact,
word for word as the document has it. Three kinds of question are asked:

- ``fact``: one statement holds the answer.
- ``chain``: the statement refers to another one ("is the same as the access code of the Porto office").
- ``list``: several numbered values of one key are asked for at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from xkv_service.demo import layout, names, prose
from xkv_service.demo import wordlists as words

Measure = Callable[[str], int]

_CHARACTERS_PER_TOKEN = 3.4
_QUESTIONS = (
    "What is the {key}?",
    "What is the {key}?",
    "Please tell me the {key}.",
    "I need the {key}.",
    "Give me the {key}.",
    "Could you look up the {key}?",
    "Do you know the {key}?",
)
_STATEMENTS = (
    "The {fact}.",
    "The {fact}.",
    "The {fact}.",
    "Please note that the {fact}.",
    "Remember that the {fact}.",
    "As of {day}, the {fact}.",
    "According to {person}, the {fact}.",
    "The {fact}, as {person} confirmed.",
)


@dataclass(frozen=True)
class Question:
    """One question about a document.

    Attributes:
        question: what the user asks.
        answer: what the model should reply, exactly.
        kind: the kind of question (``fact``, ``chain``, ``list``, or a task name of ``ruler_tasks``).
        values: the values that the answer must contain, in order.
    """

    question: str
    answer: str
    kind: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text and every question that can be asked about it."""

    text: str
    questions: tuple[Question, ...]


def approximate_tokens(text: str) -> int:
    """Return about how many tokens of the bundled tokenizer ``text`` has, without loading the tokenizer."""
    return round(len(text) / _CHARACTERS_PER_TOKEN)


def make_document(
    rng: Random, tokens: int, measure: Measure = approximate_tokens, kind: layout.Kind | None = None
) -> Document:
    """Write a document.

    Args:
        rng: the source of every choice; the same state gives the same document.
        tokens: the length to reach, as ``measure`` counts title and entries; the blank lines between them
            come on top (about two tokens in a hundred).
        measure: counts the tokens of a text.
        kind: the document's form; drawn when not given.
    """
    form: layout.Kind = rng.choice(layout.KINDS) if kind is None else kind
    filler = rng.choice((0.1, 0.3, 0.5, 0.8))
    subjects = rng.sample(names.SUBJECTS, rng.choice((1, 2, 3)))
    writer = _FactWriter(rng, subjects)
    heading = layout.title(rng, form)
    entries: list[str] = []
    room = tokens - measure(heading)
    while True:
        fresh = [layout.entry(rng, form, s) for s in _mixed(rng, writer.entry(), filler)]
        room -= sum(measure(text) for text in fresh)
        if room < 0:
            break
        writer.keep()
        entries += fresh
    rng.shuffle(entries)
    return Document("\n\n".join([heading, *entries]), tuple(writer.questions))


def _mixed(rng: Random, groups: list[list[str]], filler: float) -> list[list[str]]:
    """Spread filler sentences over groups of statements: ``filler`` is the share of prose to reach."""
    for group in groups:
        while rng.random() < filler:
            group.insert(rng.randint(0, len(group)), prose.sentence(rng))
    return groups


class _FactWriter:
    """Invents facts with distinct keys, words them as statements and asks about them."""

    def __init__(self, rng: Random, subjects: list[names.Subject]) -> None:
        self.rng = rng
        self.subjects = subjects
        self.used: set[str] = set()
        self.questions: list[Question] = []
        self._pending: list[Question] = []

    def keep(self) -> None:
        """Accept the questions of the last entry: its statements made it into the document."""
        self.questions += self._pending

    def entry(self) -> list[list[str]]:
        """Return groups of statements, each to stand in a place of its own, and note their questions."""
        self._pending = []
        draw = self.rng.random()
        subject = self.rng.choice(self.subjects)
        if draw < 0.12:
            return self._chain(subject)
        if draw < 0.24:
            return self._list(subject)
        return [self._facts(subject)]

    def _facts(self, subject: names.Subject) -> list[str]:
        entity = subject.draw(self.rng)
        attributes = self.rng.sample(subject.attributes, self.rng.randint(1, min(4, len(subject.attributes))))
        return [
            self._fact(f"{name} of {entity}", draw(self.rng))
            for name, draw in attributes
            if self._claim(name, entity)
        ]

    def _fact(self, key: str, value: str) -> str:
        self._ask(key, f"The {key} is {value}.", "fact", (value,))
        return self._state(f"{key} is {value}")

    def _chain(self, subject: names.Subject) -> list[list[str]]:
        name, draw = self.rng.choice(subject.attributes)
        entities = [subject.draw(self.rng) for _ in range(self.rng.choice((2, 2, 3)))]
        keys = [f"{name} of {entity}" for entity in entities if self._claim(name, entity)]
        if not keys:
            return []
        value = draw(self.rng)
        facts = [f"{a} is the same as the {b}" for a, b in zip(keys, keys[1:], strict=False)]
        facts.append(f"{keys[-1]} is {value}")
        for i, key in enumerate(keys):
            answer = " ".join(f"The {fact}." for fact in facts[i:])
            self._ask(key, answer, "chain" if i < len(keys) - 1 else "fact", (value,))
        return [[self._state(fact)] for fact in facts]

    def _list(self, subject: names.Subject) -> list[list[str]]:
        name, draw = self.rng.choice(subject.attributes)
        entity = subject.draw(self.rng)
        if not self._claim(name, entity):
            return []
        values = tuple(draw(self.rng) for _ in range(self.rng.choice((2, 3, 3, 4))))
        facts = [f"{words.ORDINALS[i]} {name} of {entity} is {value}" for i, value in enumerate(values)]
        answer = " ".join(f"The {fact}." for fact in facts)
        self._ask(f"{words.COUNTS[len(values)]} {name}s of {entity}", answer, "list", values)
        return [[self._state(fact)] for fact in facts]

    def _claim(self, name: str, entity: str) -> bool:
        key = f"{name} of {entity}"
        fresh = key not in self.used
        self.used.add(key)
        return fresh

    def _ask(self, key: str, answer: str, kind: str, values: tuple[str, ...]) -> None:
        question = self.rng.choice(_QUESTIONS).format(key=key)
        if kind == "list":
            question = question.replace("What is", "What are")
        self._pending.append(Question(question, answer, kind, values))

    def _state(self, fact: str) -> str:
        form = self.rng.choice(_STATEMENTS)
        day = self.rng.choice(words.WEEKDAYS)
        return form.format(fact=fact, day=day, person=names.person(self.rng))
