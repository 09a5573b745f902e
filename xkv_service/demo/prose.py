"""Filler sentences: everyday prose that carries no fact anyone asks about."""

from random import Random

from xkv_service.demo import names
from xkv_service.demo import wordlists as words

_TIMES = (
    "In the morning", "By the afternoon", "Every few weeks", "At the end of the quarter",
    "Before the holidays", "During the winter", "Shortly after lunch", "On quiet days", "From time to time",
    "Most years", "Last spring", "Towards the evening", "Once the doors are open",
    "When the weather allows it", "As a rule",
)  # fmt: skip
_ACTORS = (
    "the staff", "visitors", "the night shift", "our partners", "new colleagues", "the drivers",
    "the neighbours", "two of the interns", "the cleaning team", "the auditors", "the volunteers",
    "a small committee", "the caretakers", "regular guests", "the suppliers", "most people",
)  # fmt: skip
_DEEDS = (
    "gather around the long table", "check the lists twice", "water the plants by the window",
    "leave a short note at the desk", "talk about the plans for the year",
    "carry the boxes down the stairs", "read the notices on the wall", "take the path along the river",
    "prepare tea for everybody", "count the chairs in the hall", "file the letters by date",
    "look for the missing keys", "clean the coffee machine", "compare their calendars",
    "walk to the market square", "repair what the storm has broken", "return the borrowed tools",
    "keep the lights on a little longer", "sort the parcels by size", "wait for the last tram",
)  # fmt: skip
_REASONS = (
    "because nobody wants to start over", "so that nothing is forgotten", "even if it takes a while",
    "which has become a habit", "and nobody seems to mind", "although the rules do not ask for it",
    "since the building is old", "as the minutes of the meeting show", "before the work goes on",
    "and the results speak for themselves", "because the lift is slow",
    "so that the next team can begin at once", "while the radio plays in the background",
    "and then everyone goes home",
)  # fmt: skip
_THINGS = (
    "A good plan", "The old timetable", "A clear sign at the door", "The new form", "A short message",
    "Patience", "The shared calendar", "A tidy desk", "The weekly report", "Careful packing",
    "The spare key", "A second opinion", "The blue folder", "Fresh paint",
)  # fmt: skip
_VIRTUES = (
    "saves more time than it costs", "is worth the effort", "helps when things go wrong",
    "makes the difference between a good day and a long one", "is easily overlooked",
    "belongs to every well kept house", "should be replaced before the summer", "cannot be praised enough",
    "has to be checked by two people", "was much discussed last year",
    "is kept in the cupboard by the entrance",
)  # fmt: skip
_REMARKS = (
    "Questions are answered at the front desk.", "Copies of this page may be made freely.",
    "Further details follow in the next edition.", "The rest of the week is quiet.",
    "Lost property is kept for a month.", "Umbrellas may be left in the hall.",
    "Changes are announced on the board.", "Smoking is not allowed anywhere in the building.",
    "The heating is turned down at night.", "Bicycles belong in the yard.",
)  # fmt: skip
_NOISE = (
    "Rain falls softly on the hills.", "The road runs on without an end.", "Leaves drift over the pond.",
    "A train passes and is gone.", "The wind turns to the west.", "Snow lies on the roofs.",
)  # fmt: skip


def sentence(rng: Random) -> str:
    """Return one sentence of office prose."""
    kind = rng.randrange(8)
    if kind < 3:
        return f"{rng.choice(_TIMES)}, {rng.choice(_ACTORS)} {rng.choice(_DEEDS)} {rng.choice(_REASONS)}."
    if kind == 3:
        return f"{rng.choice(_ACTORS).capitalize()} {rng.choice(_DEEDS)}, {rng.choice(_REASONS)}."
    if kind == 4:
        return f"{rng.choice(_THINGS)} {rng.choice(_VIRTUES)}."
    if kind == 5:
        day = rng.choice(words.WEEKDAYS)
        return f"On {day} {names.person(rng)} visited {names.place(rng)} and brought back the {_thing(rng)}."
    if kind == 6:
        return (
            f"{names.person(rng)} once said that {rng.choice(_ACTORS)} in {names.place(rng)} {_deed_of(rng)}."
        )
    return rng.choice(_REMARKS)


def _thing(rng: Random) -> str:
    return names.adjective_noun(rng)


def _deed_of(rng: Random) -> str:
    return f"{rng.choice(_DEEDS)} {rng.choice(_REASONS)}"


def noise(rng: Random) -> str:
    """Return one of a few sentences that a haystack repeats over and over."""
    return rng.choice(_NOISE)
