"""Logs of a server's processes: the project's lines go where Ray Serve writes its own, in the same form."""

from __future__ import annotations

import logging
from typing import Any, Literal

LogFormat = Literal["json", "text"]
_SERVE = "ray.serve"
_PROJECT = ("xkv_artifacts", "xkv_service", "xkv_workers")


class _ToServe(logging.Handler):
    """Hands a line to Serve, which knows this process's file, its replica and the request it answers."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(_SERVE).handle(record)


def join_serve() -> None:
    """Send the project's lines, from INFO on, the way of Serve's own. Called once in each replica."""
    for name in _PROJECT:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_ToServe()], False
        logger.setLevel(logging.INFO)


def serve_logging(form: LogFormat, *, calls: bool = False) -> dict[str, Any]:
    """Serve's `logging_config`.

    Args:
        calls: one line of Serve's for each call. Of HTTP requests the ingress tells more itself.
    """
    return {"encoding": form.upper(), "enable_access_log": calls}
