"""Draws names: the things facts are about (keys) and the things facts say (values)."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from xkv_service.demo import wordlists as words

Draw = Callable[[Random], str]

_INVENTED_SHARE = 0.25
_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def invented_word(rng: Random) -> str:
    """Return a capitalised word of two or three syllables that no list holds, such as ``Trealkou``."""
    syllables = (
        rng.choice(words.SYLLABLE_ONSETS)
        + rng.choice(words.SYLLABLE_VOWELS)
        + rng.choice(words.SYLLABLE_CODAS)
        for _ in range(rng.choice((2, 2, 3)))
    )
    return "".join(syllables).capitalize()


def place(rng: Random) -> str:
    """Return a city, or in a quarter of the draws an invented place."""
    return invented_word(rng) if rng.random() < _INVENTED_SHARE else rng.choice(words.CITIES)


def person(rng: Random) -> str:
    """Return a first and a last name."""
    last = invented_word(rng) if rng.random() < _INVENTED_SHARE else rng.choice(words.LAST_NAMES)
    return f"{rng.choice(words.FIRST_NAMES)} {last}"


def digits(rng: Random, count: int) -> str:
    """Return ``count`` decimal digits, the first of them not zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def adjective_noun(rng: Random, joint: str = " ") -> str:
    """Return two words such as ``amber falcon``."""
    return f"{rng.choice(words.ADJECTIVES)}{joint}{rng.choice(words.NOUNS)}"


def uuid(rng: Random) -> str:
    """Return 32 hexadecimal digits in the usual 8-4-4-4-12 groups."""
    text = f"{rng.getrandbits(128):032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _number(low: int, high: int) -> Draw:
    return lambda rng: digits(rng, rng.randint(low, high))


def _code(rng: Random) -> str:
    return f"{rng.choice(_UPPER)}{rng.choice(_UPPER)}-{digits(rng, 4)}"


def _date(rng: Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)} {rng.randint(1950, 2049)}"


def _time(rng: Random) -> str:
    return f"{rng.randint(6, 22):02d}:{rng.randint(0, 59):02d}"


def _site(rng: Random) -> str:
    return f"the {place(rng)} {rng.choice(words.SITES)}"


def _department(rng: Random) -> str:
    return f"the {place(rng)} {rng.choice(words.DEPARTMENTS)} department"


def _project(rng: Random) -> str:
    return f"project {adjective_noun(rng).title()}"


def _product(rng: Random) -> str:
    return (
        f"the {adjective_noun(rng)} {rng.choice(('kit', 'lamp', 'chair', 'pump', 'clock', 'radio', 'tent'))}"
    )


def _room(rng: Random) -> str:
    return f"room {rng.randint(1, 9)}.{rng.randint(10, 99)}"


@dataclass(frozen=True)
class Subject:
    """One kind of thing that documents keep facts about.

    Attributes:
        draw: draws one such thing, worded as it stands inside a sentence (``the Lisbon office``).
        attributes: pairs of an attribute's name and the draw of its values.
    """

    draw: Draw
    attributes: tuple[tuple[str, Draw], ...]


_PLACE_ATTRIBUTES: tuple[tuple[str, Draw], ...] = (
    ("access code", _number(5, 5)),
    ("alarm code", _number(4, 6)),
    ("phone extension", _number(4, 4)),
    ("annual budget", _number(5, 7)),
    ("inventory number", _number(6, 6)),
    ("safe combination", _number(6, 6)),
    ("manager", person),
    ("deputy manager", person),
    ("password", adjective_noun),
    ("courier reference", _code),
    ("opening date", _date),
    ("delivery time", _time),
)

SUBJECTS: tuple[Subject, ...] = (
    Subject(_site, _PLACE_ATTRIBUTES),
    Subject(_department, _PLACE_ATTRIBUTES),
    Subject(
        person,
        (
            ("staff number", _number(5, 6)),
            ("locker number", _number(3, 4)),
            ("phone extension", _number(4, 4)),
            ("badge code", _code),
            ("home town", place),
            ("supervisor", person),
            ("start date", _date),
            ("pass phrase", adjective_noun),
        ),
    ),
    Subject(
        _project,
        (
            ("account number", _number(5, 6)),
            ("order reference", _code),
            ("sponsor", person),
            ("lead engineer", person),
            ("code word", adjective_noun),
            ("deadline", _date),
            ("meeting place", place),
        ),
    ),
    Subject(
        _product,
        (
            ("article number", _number(5, 6)),
            ("shelf number", _number(3, 4)),
            ("supplier", person),
            ("batch code", _code),
            ("price code", _number(4, 5)),
            ("release date", _date),
            ("country depot", place),
        ),
    ),
    Subject(
        _room,
        (
            ("door code", _number(4, 5)),
            ("key number", _number(3, 4)),
            ("caretaker", person),
            ("network name", adjective_noun),
            ("inspection date", _date),
        ),
    ),
)
