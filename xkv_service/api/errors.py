"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from xkv_artifacts.errors import (
    CatalogError,
    CatalogUnavailable,
    InvalidLimits,
    QuotaExceeded,
    StoreError,
    XKVError,
)
from xkv_service.engine.messages import Failed
from xkv_service.errors import Overloaded

RETRY_S = 1.0
"""What Retry-After says where nothing better is known."""

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
# Pydantic tells the place of an error with the types that it tried there.
_UNION_MEMBER = re.compile(r"(str|int|list\[.*|function-.*)$")
_UNREACHABLE = (StoreError, CatalogUnavailable, CatalogError, InvalidLimits)
_NO_OBJECT = "the body is not a JSON object: send one, with the header Content-Type: application/json"
_log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class APIError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP. message: one line for the client.
        param: the parameter that was wrong, as a path ("messages.0.content").
        code: for programs. retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        detail = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> Response:
        """The whole answer."""
        headers = dict(_EXTRA_HEADERS.get(self.status, {}))
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        # ASCII: a text that is not Unicode may be quoted in the message.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, headers, media_type="application/json")


_EXTRA_HEADERS: Mapping[int, Mapping[str, str]] = {401: {"www-authenticate": "Bearer"}}


def of_failure(failed: Failed) -> APIError:
    """What an engine's failure is over HTTP."""
    message = f"{failed.message} ({failed.hint})" if failed.hint else failed.message
    if failed.kind == "invalid":
        return APIError(400, message)
    if failed.kind == "overloaded":
        return APIError(503, message, code="overloaded", retry_after_s=failed.retry_after_s or RETRY_S)
    if failed.kind == "timeout":
        return APIError(504, message, code="timeout")
    return APIError(500, message, code="internal_error")


def of_fault(error: XKVError) -> APIError:
    """What one of the project's own errors is over HTTP: the client's fault, or a store that is away."""
    if isinstance(error, _UNREACHABLE):
        _log.warning("%s", error.message)  # where the store is, is not for clients
        message = "the store of prefixes does not answer"
        return APIError(503, message, code="store_unavailable", retry_after_s=RETRY_S)
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, Overloaded):
        return APIError(503, message, code="overloaded", retry_after_s=RETRY_S)
    if isinstance(error, QuotaExceeded):
        return APIError(403, message, code="quota_exceeded")
    return APIError(400, message)


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
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        response = APIError(error.status_code, _told(request, error)).response()
        response.headers.update(error.headers or {})
        return response


def _told(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"unknown address: {request.method} {request.url.path}"
    if error.status_code == 405:
        return f"{request.method} is not allowed at {request.url.path}"
    return str(error.detail)


def _invalid(error: RequestValidationError) -> APIError:
    """The first thing that is wrong with a body; OpenAI answers 400 where FastAPI would 422."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    place = takewhile(lambda part: not _UNION_MEMBER.match(part), map(str, first["loc"][1:]))
    param = ".".join(place)
    if first["type"] == "missing":
        return APIError(400, f"{param or 'a JSON body'} is missing", param=param or None)
    if first["type"] == "extra_forbidden":
        return APIError(400, f"unknown parameter: {param}", param=param, code="unknown_parameter")
    if first["type"] == "model_attributes_type":
        text = f"{param}: not a JSON object" if param else _NO_OBJECT
        return APIError(400, text, param=param or None)
    message = first["msg"].removeprefix("Value error, ")
    return APIError(400, f"{param}: {message}" if param else message, param=param or None)
