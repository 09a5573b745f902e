"""What counts as an integer and as a number in a setting: `True` is neither, though Python takes it for 1."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)
