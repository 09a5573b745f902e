"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


class SizeType(click.ParamType[int]):
    """Bytes: 500MB, 4GiB, or a plain number."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None or (match[3] and not match[2]):
            self.fail(f"{value!r} is no size: use 500MB, 4GiB or a number of bytes", param, ctx)
        number, unit, binary = match.groups()
        factor = _UNITS[unit.lower()]
        if binary:
            factor = 1024 ** ("kmgt".index(unit.lower()) + 1)
        return int(float(number) * factor)
