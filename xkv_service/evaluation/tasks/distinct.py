"""Draws that never repeat: a sample whose keys or values came twice would have two right answers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random


class Distinct:
    """Draws from one source of choices, none of them twice."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self._used: set[str] = set()

    def draw(self, make: Callable[[Random], str]) -> str:
        """A text that was not drawn here before."""
        while (text := make(self.rng)) in self._used:
            pass
        self._used.add(text)
        return text
