"""What is wrong with a value that Pydantic refused, in the project's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xkv_service.api.errors import shortened

_WORDS = {
    "string_type": "must be a text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "extra_forbidden": "is unknown: leave it out",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "is too short: it needs {min_length} or more {things}",
    "string_too_short": "is too short: it needs {min_length} or more {things}",
    "too_long": "is too long: it may have {max_length} {things}",
    "string_too_long": "is too long: it may have {max_length} {things}",
}
"""What each of Pydantic's types of error says, behind the parameter's name."""


def wrong(first: Mapping[str, Any]) -> str:
    """What is wrong with a parameter, behind its name."""
    kind, value = first["type"], first.get("input")
    if kind == "missing":
        return " is missing"
    if kind not in _WORDS:
        return f": {said(first)}"
    things = "characters" if isinstance(value, str) else "entries"
    limits = {name: _plain(limit) for name, limit in first.get("ctx", {}).items()}
    words = _WORDS[kind].format(things=things, **limits)
    if isinstance(value, bool | int | float) or (isinstance(value, str) and things not in words):
        return f" {words}, not {shortened(json.dumps(value))}"
    return f" {words}"


def said(error: Mapping[str, Any]) -> str:
    """What a validator of the API said."""
    return str(error["msg"]).removeprefix("Value error, ")


def _plain(limit: Any) -> Any:
    """2.0 as 2."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
