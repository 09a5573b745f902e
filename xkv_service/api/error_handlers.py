"""Have an app tell every error as an `APIError`, and what is wrong with a body in the API's own words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path

from xkv_artifacts.errors import XKVError
from xkv_service.api.errors import APIError, of_fault, shortened
from xkv_service.api.validation_words import said, wrong

# Pydantic tells the place of an error with the types that it tried there.
_UNION_MEMBER = re.compile(r"(str|int|list\[.*|function-.*)$")
_NO_OBJECT = "the body is not a JSON object: send one, with the header Content-Type: application/json"


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
        if error.status_code == 405 and (methods := _methods(request)):
            error.headers = {"Allow": ", ".join(methods)}
        response = _of_framework(request, error).response()
        response.headers.update(error.headers or {})
        return response


def _of_framework(request: Request, error: HTTPException) -> APIError:
    address = f"{request.method} {shortened(request.url.path)}"
    if error.status_code == 404:
        return APIError(404, f"unknown address: {address} (GET /openapi.json tells which there are)")
    if error.status_code == 405:
        *others, last = (error.headers or {})["Allow"].split(", ")
        allowed = f"{', '.join(others)} or {last}" if others else last
        return APIError(405, f"not allowed: {address} (use {allowed})")
    if error.status_code == 400 and error.__cause__ is not None:
        return APIError(400, _unreadable(error.__cause__), code="invalid_json")
    return APIError(error.status_code, str(error.detail))


def _methods(request: Request) -> list[str]:
    """What the address takes, as far as the OpenAPI document tells; the framework names one route's alone."""
    paths = request.app.openapi()["paths"].items()
    found = (operations for path, operations in paths if compile_path(path)[0].match(request.url.path))
    return sorted({method.upper() for operations in found for method in operations})


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
        return APIError(400, _NO_OBJECT if kind in ("missing", "model_attributes_type") else said(first))
    return APIError(400, f"{param}{wrong(first)}", param=param)


def _unknown(param: str, meant: list[str]) -> APIError:
    instead = f"did you mean {meant[0]}? Else leave it out" if meant else "leave it out"
    return APIError(400, f"unknown parameter: {param} ({instead})", param=param, code="unknown_parameter")
