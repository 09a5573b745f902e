"""Markup that cannot be broken by what it shows: text is escaped unless this module made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u200d\u2010-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
"""Characters that XML forbids, and those that turn the direction of the text after them."""


class Markup(str):
    """Made by this module, never from outside."""


def escaped(value: object) -> Markup:
    """A value as text, or markup as it is."""
    return value if isinstance(value, Markup) else Markup(escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def joined(*parts: object) -> Markup:
    """Parts after one another."""
    return Markup("".join(map(escaped, parts)))


def breakable(text: str) -> Markup:
    """Text that a line may break at each +."""
    return Markup("<wbr>+".join(map(escaped, text.split("+"))))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. Attributes: `class_` is class, `_` is -; None is left out, numbers have one decimal."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{named}>{joined(*children)}</{tag}>")


def _attribute(value: object) -> str:
    return f"{round(value, 2):g}" if isinstance(value, float) else escaped(value)


def table(caption: str, heads: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table that scrolls in its own box; the first cell of a row is its header."""
    head = element("tr", *(element("th", one, scope="col") for one in heads))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", one) for one in row[1:]))
        for row in rows
    ]
    inner = element(
        "table", element("caption", element("span", caption)), element("thead", head), element("tbody", *body)
    )
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)
