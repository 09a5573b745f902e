"""Text from files, stores and other people, as a terminal may have it."""

from __future__ import annotations

import unicodedata

_COMMANDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of what moves the cursor, changes colours, turns the order of letters around, ends a
line or cannot be written."""


def escaped(text: str) -> str:
    """One line in which nothing commands the terminal: such characters as Python writes them, `\\x1b` say."""
    if text.isprintable():
        return text
    return "".join(ascii(one)[1:-1] if unicodedata.category(one) in _COMMANDS else one for one in text)
