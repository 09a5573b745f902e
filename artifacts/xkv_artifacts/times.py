"""Times to live as people write them."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TIME = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([smhd]?)", re.ASCII)


def seconds_of(text: str) -> float | None:
    """Seconds of 90s, 15m, 12h, 7d or a plain number; None: it is not a time."""
    match = _TIME.fullmatch(text)
    return None if match is None else float(match[1]) * _UNITS[match[2] or "s"]
