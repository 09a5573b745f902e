"""Times to live as options take them."""

from __future__ import annotations

from typing import Any

import click

from xkv_artifacts.times import seconds_of


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
        seconds = seconds_of(text)
        if seconds is None:
            ways = "90s, 15m, 12h, 7d or none" if self._none else "90s, 15m, 12h or 7d"
            if text.startswith("-") and seconds_of(text[1:]) is not None:
                self.fail(f"{text[:40]!r} is below 0: write {ways}", param, ctx)
            self.fail(f"{text[:40]!r} is not a time: write {ways}", param, ctx)
        return seconds
