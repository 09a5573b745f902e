"""Tasks after RULER's definitions (arXiv 2404.06654), worded for this model.

Needle tasks hide sentences that give secret values for keys in a haystack of repeated noise, of prose, or
of further needles; variable tracking hides assignments that pass a value on. As everywhere in the demo, an
answer restates what the text says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from xkv_service.demo import names, prose
from xkv_service.demo.documents import Document, Measure, Question, approximate_tokens

Haystack = Literal["noise", "essay", "needles"]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CHAIN_LENGTH = 5


def _word_key(rng: Random) -> str:
    return names.adjective_noun(rng, "-")


def _number(rng: Random) -> str:
    return names.digits(rng, 7)


@dataclass(frozen=True)
class NeedleTask:
    """What one needle task hides and asks.

    Attributes:
        haystack: what surrounds the needles.
        noun: how the question calls a value (``number``, ``identifier``, ``word``).
        keys: how many keys are hidden, besides the keys of a haystack made of needles.
        values: how many values each key has.
        queries: how many keys one question asks for.
        draw_key: draws a key.
        draw_value: draws a value.
    """

    haystack: Haystack
    noun: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    draw_key: Callable[[Random], str] = _word_key
    draw_value: Callable[[Random], str] = _number


NEEDLE_TASKS: dict[str, NeedleTask] = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", "identifier", draw_value=names.uuid),
    "niah_multikey_1": NeedleTask("essay", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", "identifier", draw_key=names.uuid, draw_value=names.uuid),
    "niah_multivalue": NeedleTask("essay", values=4),
    "niah_multiquery": NeedleTask("essay", keys=4, queries=4),
    "niah_words": NeedleTask("essay", "word", keys=4, draw_value=_word_key),
}
TASKS: tuple[str, ...] = (*NEEDLE_TASKS, "variable_tracking")


def make_task(
    name: str, rng: Random, tokens: int, measure: Measure = approximate_tokens, spread: int = 1
) -> Document:
    """Write one haystack of about ``tokens`` tokens and the questions of task ``name``.

    Args:
        name: one of ``TASKS``.
        rng: the source of every choice.
        tokens: the length to reach, as ``measure`` counts it.
        measure: counts the tokens of a text.
        spread: multiplies the keys (or chains) hidden: one haystack then serves many questions.
    """
    if name == "variable_tracking":
        return _variable_tracking(rng, tokens, measure, spread)
    return _needles(name, NEEDLE_TASKS[name], rng, tokens, measure, spread)


def _needles(
    name: str, task: NeedleTask, rng: Random, tokens: int, measure: Measure, spread: int
) -> Document:
    intro = f"The text below mentions secret {task.noun}s. Keep them in mind: you will be asked about them."
    secrets: dict[str, list[str]] = {}
    room = tokens - measure(intro)
    sentences: list[str] = []
    while len(secrets) < task.keys * spread or task.haystack == "needles":
        key = task.draw_key(rng)
        values = _values(rng, task)
        fresh = [_needle(task.noun, key, value) for value in values]
        room -= sum(measure(text) + 1 for text in fresh)
        if room < 0:
            break
        if key not in secrets:
            secrets[key] = values
            sentences += fresh
    text = _hide(rng, sentences, task.haystack, room, measure)
    return Document(f"{intro}\n\n{text}", tuple(_ask(name, task, rng, secrets)))


def _values(rng: Random, task: NeedleTask) -> list[str]:
    """Draw the values of one key in ascending order; several of them differ in their first digit."""
    if task.values == 1:
        return [task.draw_value(rng)]
    leads = sorted(rng.sample("123456789", task.values))
    return [lead + task.draw_value(rng)[1:] for lead in leads]


def _needle(noun: str, key: str, value: str) -> str:
    return f"One of the secret {noun}s for {key} is: {value}."


def _hide(rng: Random, needles: list[str], haystack: Haystack, room: int, measure: Measure) -> str:
    """Scatter ``needles`` over a haystack that takes ``room`` tokens, and return the whole text."""
    draw = prose.noise if haystack == "noise" else prose.sentence
    hay: list[str] = []
    while haystack != "needles" and room > 0:
        hay.append(draw(rng))
        room -= measure(hay[-1]) + 1
    places = sorted(rng.randint(0, len(hay)) for _ in needles)
    needles = needles.copy()
    rng.shuffle(needles)
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        hay.insert(place, needle)
    return "\n".join(hay) if haystack == "needles" else " ".join(hay)


def _ask(name: str, task: NeedleTask, rng: Random, secrets: dict[str, list[str]]) -> list[Question]:
    """Ask for ``task.queries`` keys at a time; the answer lists a key's values in ascending order."""
    keys = list(secrets)
    rng.shuffle(keys)
    questions = []
    for start in range(0, len(keys) - task.queries + 1, task.queries):
        chosen = keys[start : start + task.queries]
        needles = [(value, _needle(task.noun, key, value)) for key in chosen for value in secrets[key]]
        plural = "s" if task.values > 1 or task.queries > 1 else ""
        verb = "are all the" if plural else "is the"
        order = ", smallest first" if task.values > 1 else ""
        question = (
            f"What {verb} secret {task.noun}{plural} for {_listed(chosen)} mentioned in the text{order}?"
        )
        answer = " ".join(needle for _, needle in needles)
        questions.append(Question(question, answer, name, tuple(value for value, _ in needles)))
    return questions


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _variable_tracking(rng: Random, tokens: int, measure: Measure, spread: int) -> Document:
    intro = "The text below assigns values to variables. Keep track of them: you will be asked about them."
    chains: list[list[str]] = []
    questions = []
    used: set[str] = set()
    for _ in range(spread):
        value = names.digits(rng, 5)
        variables = [_variable(rng, used) for _ in range(_CHAIN_LENGTH)]
        sources = [value, *(f"VAR {variable}" for variable in variables)]
        chain = [f"VAR {v} = {source}." for v, source in zip(variables, sources, strict=False)]
        chains.append(chain)
        question = f"Which variables hold the value {value}?"
        questions.append(Question(question, " ".join(chain), "variable_tracking", tuple(variables)))
    room = tokens - measure(intro) - sum(measure(text) + 1 for chain in chains for text in chain)
    hay: list[str] = []
    while room > 0:
        hay.append(prose.noise(rng))
        room -= measure(hay[-1]) + 1
    for chain in chains:
        places = sorted(rng.randint(0, len(hay)) for _ in chain)
        for place, text in zip(reversed(places), reversed(chain), strict=True):
            hay.insert(place, text)
    return Document(f"{intro}\n\n{' '.join(hay)}", tuple(questions))


def _variable(rng: Random, used: set[str]) -> str:
    while True:
        name = "".join(rng.choice(_LETTERS) for _ in range(5))
        if name not in used:
            used.add(name)
            return name
