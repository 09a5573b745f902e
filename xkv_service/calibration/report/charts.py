"""Charts as data: what is drawn, for whoever draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Side = Literal["key", "value"]
SIDES: tuple[Side, ...] = ("key", "value")


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        label: what it is of, with its unit.
        low, high: its ends; above zero if `log`.
        ticks: (where, text).
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Point(NamedTuple):
    """A point, the ends of its error bar (the same where there is none), and what it says in words."""

    x: float
    y: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Series:
    """One line; `style` numbers its colour and its marker, a `bold` one is the one to look at."""

    name: str
    style: int
    points: tuple[Point, ...]
    bold: bool = False


@dataclass(frozen=True)
class Lines:
    """Lines over two axes. `palette`: "steps", or a side's shades."""

    name: str
    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    palette: str = "steps"


@dataclass(frozen=True)
class Heat:
    """Shaded cells.

    Args:
        cells: by row and column, shade from 0 to 1 and what it says; None where unknown.
        columns: layer numbers. rows: labels; empty where rows are layers as columns are.
        blocks: (first, count) of the columns that a group holds, outlined.
        ends: what the palest and the fullest shade mean.
    """

    name: str
    title: str
    note: str
    side: Side
    cells: tuple[tuple[tuple[float, str] | None, ...], ...]
    columns: tuple[int, ...]
    rows: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...]
    ends: tuple[str, str]


@dataclass(frozen=True)
class Stacks:
    """Bars over the groups, keys upwards and values downwards, each a stack of parts.

    Args:
        groups: layers of each. levels: what the parts are, least first.
        parts: by side, group and level, bits a token. Empty: only the groups are drawn.
    """

    name: str
    title: str
    note: str
    groups: tuple[tuple[int, ...], ...]
    levels: tuple[str, ...]
    parts: dict[Side, tuple[tuple[float, ...], ...]]


Chart = Lines | Heat | Stacks


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * place for place in range(first, math.floor(high / step + 1e-9) + 1)]
