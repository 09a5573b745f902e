"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from xkv_artifacts.errors import (
    CatalogError,
    CatalogUnavailable,
    InvalidCursor,
    InvalidKey,
    InvalidLimits,
    InvalidNamespace,
    QuotaExceeded,
    StoreError,
    XKVError,
)
from xkv_service.engine.messages import Failed
from xkv_service.errors import InvalidPrompt, InvalidSpec, Overloaded, UnsupportedModel

EVENTS = "text/event-stream"
"""The media type of streams."""
RETRY_S = 1.0
"""What Retry-After says where nothing better is known."""

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_MOST_SHOWN = 100
_UNREACHABLE = (StoreError, CatalogUnavailable, CatalogError)
_CLIENTS = (InvalidPrompt, InvalidSpec, InvalidCursor, InvalidKey, InvalidNamespace, UnsupportedModel)
"""Their messages speak of what a client sent; others may say where the store is, which is not for clients."""
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

    def event(self) -> bytes:
        """What ends a stream that has begun."""
        # ASCII: a text that is not Unicode may be quoted in the message.
        return b"data: %s\n\n" % json.dumps(self.body()).encode("ascii")

    def response(self) -> Response:
        """The whole answer."""
        headers = dict(_EXTRA_HEADERS.get(self.status, {}))
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, headers, media_type="application/json")


_EXTRA_HEADERS: Mapping[int, Mapping[str, str]] = {401: {"www-authenticate": "Bearer"}}


def of_failure(failed: Failed) -> APIError:
    """What an engine's failure is over HTTP."""
    message = f"{failed.message} ({failed.hint})" if failed.hint else failed.message
    if failed.kind == "invalid":
        return APIError(400, message)
    if failed.kind in ("overloaded", "queue_timeout"):
        return APIError(503, message, code=failed.kind, retry_after_s=failed.retry_after_s or RETRY_S)
    if failed.kind == "timeout":
        return APIError(504, message, code="timeout")
    return APIError(500, message, code="internal_error")


def told(error: XKVError) -> str:
    """Its message and hint, in one line. What the command line calls the raw template is an address here."""
    hint = (error.hint or "").replace("--template raw", "/v1/completions")
    return f"{error.message} ({hint})" if hint else error.message


def of_fault(error: XKVError) -> APIError:
    """What one of the project's own errors is over HTTP: the client's fault, a store that is away, or else an
    error of the server's own, of which the log has the words."""
    if isinstance(error, _UNREACHABLE):
        _log.warning("%s", error.message)
        message = "the store of prefixes does not answer"
        return APIError(503, message, code="store_unavailable", retry_after_s=RETRY_S)
    if isinstance(error, InvalidLimits):
        _log.error("no prefix can be made: %s", told(error))
        message = "the file of limits of this server's store cannot be read: its operator must mend it"
        return APIError(503, message, code="store_misconfigured", retry_after_s=RETRY_S)
    if isinstance(error, Overloaded):
        return APIError(503, told(error), code="overloaded", retry_after_s=RETRY_S)
    if isinstance(error, QuotaExceeded):
        return APIError(403, told(error), code="quota_exceeded")
    if isinstance(error, _CLIENTS):
        return APIError(400, told(error), param="after" if isinstance(error, InvalidCursor) else None)
    _log.error("%s: %s", type(error).__name__, error.message)
    return APIError(500, "internal error", code="internal_error")


def shortened(text: str) -> str:
    """What a client sent, as far as it is worth sending back."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
