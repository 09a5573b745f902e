"""How a document looks on the page: titles, headings, paragraphs, bullets."""

from random import Random
from typing import Literal, get_args

from xkv_service.demo import names
from xkv_service.demo import wordlists as words

Kind = Literal["register", "handbook", "notices", "minutes"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TITLES: dict[Kind, tuple[str, ...]] = {
    "register": ("Register of", "Directory of", "Inventory of", "Index of"),
    "handbook": ("Handbook of", "Guide to", "Manual of", "Rules of"),
    "notices": ("Notices of", "Bulletin of", "News from", "Announcements of"),
    "minutes": ("Minutes of", "Report of", "Protocol of", "Record of"),
}
_BODIES = ("Society", "Company", "Union", "Foundation", "Institute", "Association", "Trust", "Council")
_TOPICS = (
    "General remarks", "Access and keys", "People", "Opening hours", "Deliveries", "Records", "Safety",
    "Contacts", "Changes this month", "Equipment", "Open questions", "Housekeeping", "Appointments",
    "Storage",
)  # fmt: skip


def title(rng: Random, kind: Kind) -> str:
    """Return the document's first line, a Markdown title."""
    body = f"the {names.place(rng)} {names.adjective_noun(rng).title()} {rng.choice(_BODIES)}"
    return f"# {rng.choice(_TITLES[kind])} {body}"


def entry(rng: Random, kind: Kind, sentences: list[str]) -> str:
    """Set one group of sentences as a block of the document, without blank lines around it."""
    if kind == "register":
        return "\n".join(f"- {text}" for text in sentences)
    paragraph = " ".join(sentences)
    draw = rng.random()
    if kind == "handbook" and draw < 0.2:
        return f"## {rng.choice(_TOPICS)}\n\n{paragraph}"
    if kind == "notices" and draw < 0.5:
        return f"{rng.choice(words.WEEKDAYS)}, {rng.randint(1, 28)} {rng.choice(words.MONTHS)}: {paragraph}"
    if kind == "minutes" and draw < 0.5:
        return f"{rng.randint(8, 18):02d}:{rng.randint(0, 59):02d} {names.person(rng)} reported. {paragraph}"
    return paragraph
