"""What needles are hidden in: a passage over and over, prose of our own, or a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from pathlib import Path
from random import Random

from xkv_service.demo import prose
from xkv_service.errors import InvalidSpec

Haystack = Callable[[Random], Iterator[str]]
"""Draws an endless stream of sentences."""

_PASSAGE = (
    "The kettle is warm.",
    "A clock ticks in the next room.",
    "Somebody has left the gate open.",
    "Then the evening comes.",
    "Tomorrow will be much the same.",
)


def passage(rng: Random) -> Iterator[str]:
    """One passage, over and over."""
    return cycle(_PASSAGE)


def written_prose(rng: Random) -> Iterator[str]:
    """Sentences of office prose that no one else has written (`xkv_service.demo.prose`)."""
    return (prose.sentence(rng) for _ in repeat(None))


def read_haystack(path: Path) -> Haystack:
    """The sentences of a text file, from a drawn sentence on, over and over.

    Raises:
        InvalidSpec: the file cannot be read as UTF-8 text, or has no sentence in it.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"the haystack {path} cannot be read: {error}", hint="give a UTF-8 text") from None
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise InvalidSpec(f"the haystack {path} is empty", hint="give a text file with sentences in it")

    def draw(rng: Random) -> Iterator[str]:
        start = rng.randrange(len(sentences))
        return chain(sentences[start:], cycle(sentences))

    return draw


def scatter(sentences: list[str], hay: list[str], depths: list[float]) -> list[str]:
    """`hay` with each sentence at its depth, 0 (the beginning) to 1 (the end), in the order of depths."""
    text: list[str] = []
    done = 0
    for depth, sentence in sorted(zip(depths, sentences, strict=True)):
        place = round(depth * len(hay))
        text += [*hay[done:place], sentence]
        done = place
    return text + hay[done:]
