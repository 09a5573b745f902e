"""Times to live as people write them."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TIME = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([smhd]?)", re.ASCII)


class TimeType(click.ParamType["float | None"]):
    """Seconds: 90s, 15m, 12h, 7d, or a plain number.

    Args:
        none: whether "none" is a time as well, which is None.
    """

    name = "TIME"

    def __init__(self, *, none: bool = False) -> None:
        self._none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        if self._none and text == "none":
            return None
        match = _TIME.fullmatch(text)
        if match is None:
            ways = "90s, 15m, 12h, 7d or none" if self._none else "90s, 15m, 12h or 7d"
            if text.startswith("-") and _TIME.fullmatch(text[1:]):
                self.fail(f"{text[:40]!r} is below 0: write {ways}", param, ctx)
            self.fail(f"{text[:40]!r} is not a time: write {ways}", param, ctx)
        return float(match[1]) * _UNITS[match[2] or "s"]
