"""Times in seconds as people write them."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TIME = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([smhd]?)", re.ASCII)


def parse_time(text: str) -> float | None:
    """Seconds of 90s, 15m, 12h, 7d or a plain number; None where it is no time."""
    match = _TIME.fullmatch(text.strip())
    return None if match is None else float(match[1]) * _UNITS[match[2] or "s"]


class TimeType(click.ParamType[float]):
    """Seconds: 90s, 15m, 12h, 7d, or a plain number."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        seconds = parse_time(str(value))
        if seconds is None:
            self.fail(f"{str(value)[:40]!r} is not a time: write 90s, 15m, 12h or 7d", param, ctx)
        return seconds
