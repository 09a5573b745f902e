"""Sizes in bytes as people write them."""

from __future__ import annotations

from typing import Any

import click


class SizeType(click.ParamType[int]):
    """Bytes: 500MB, 4GiB, or a plain number."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from xkv_artifacts.errors import InvalidLimits
        from xkv_artifacts.limits import parse_size

        try:
            return parse_size(str(value))
        except InvalidLimits as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)
