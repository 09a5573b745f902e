"""Have an app tell every error as an `APIError`, and what is wrong with a body in the API's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from xkv_artifacts.errors import XKVError
from xkv_service.api.errors import APIError, of_fault, shortened

# Pydantic tells the place of an error with the types that it tried there.
_UNION_MEMBER = re.compile(r"(str|int|list\[.*|function-.*)$")
_NO_OBJECT = "the body is not a JSON object: send one, with the header Content-Type: application/json"
_WORDS = {
    "string_type": "must be a text",
    "list_type": "must be a list",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "model_attributes_type": "must be a JSON object",
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


def install(app: FastAPI) -> None:
    """Have the app tell every error in this form, the framework's own too."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(XKVError)
    async def fault(request: Request, error: XKVError) -> Response:
        return of_fault(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        response = _of_framework(request, error).response()
        response.headers.update(error.headers or {})
        return response


def _of_framework(request: Request, error: HTTPException) -> APIError:
    address = f"{request.method} {shortened(request.url.path)}"
    if error.status_code == 404:
        return APIError(404, f"unknown address: {address} (GET /openapi.json tells which there are)")
    if error.status_code == 405:
        return APIError(405, f"not allowed: {address} (GET /openapi.json tells what is)")
    if error.status_code == 400 and error.__cause__ is not None:
        return APIError(400, _unreadable(error.__cause__), code="invalid_json")
    return APIError(error.status_code, str(error.detail))


def _unreadable(cause: BaseException) -> str:
    """Why a body cannot be read as JSON, where it is not a matter of JSON's grammar."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not text in UTF-8: byte {cause.start} of it is none (send JSON in UTF-8)"
    if isinstance(cause, RecursionError):
        return "the body is nested too deeply"
    if isinstance(cause, ValueError):
        return "the body has a number of too many digits"
    return "the body cannot be read"


def _invalid(first: Mapping[str, Any]) -> APIError:
    """The first thing that is wrong with a body; OpenAI answers 400 where FastAPI would 422."""
    kind = first["type"]
    if kind == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return APIError(400, message, code="invalid_json")
    place = [*takewhile(lambda part: not _UNION_MEMBER.match(part), map(str, first["loc"][1:]))]
    if kind == "unknown_name":
        return _unknown(shortened(".".join([*place, first["ctx"]["name"]])), first["ctx"]["meant"])
    param = shortened(".".join(place))
    if not param:
        return APIError(400, _NO_OBJECT if kind in ("missing", "model_attributes_type") else _said(first))
    return APIError(400, f"{param}{_told(first)}", param=param)


def _unknown(param: str, meant: list[str]) -> APIError:
    instead = f"did you mean {meant[0]}? Else leave it out" if meant else "leave it out"
    return APIError(400, f"unknown parameter: {param} ({instead})", param=param, code="unknown_parameter")


def _told(first: Mapping[str, Any]) -> str:
    """What is wrong with a parameter, behind its name."""
    kind, value = first["type"], first.get("input")
    if kind == "missing":
        return " is missing"
    if kind not in _WORDS:
        return f": {_said(first)}"
    things = "characters" if isinstance(value, str) else "entries"
    limits = {name: _plain(limit) for name, limit in first.get("ctx", {}).items()}
    words = _WORDS[kind].format(things=things, **limits)
    if isinstance(value, bool | int | float) or (isinstance(value, str) and things not in words):
        return f" {words}, not {shortened(json.dumps(value))}"
    return f" {words}"


def _said(error: Mapping[str, Any]) -> str:
    """What a validator of the API said."""
    return str(error["msg"]).removeprefix("Value error, ")


def _plain(limit: Any) -> Any:
    """2.0 as 2."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
