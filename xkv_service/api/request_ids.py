"""Ids of requests: a client's own where it is sane, else a new one."""

from __future__ import annotations

import re
import uuid

_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


def request_id(given: str) -> str:
    """What a request is called in answers and logs: as its client says, if that is 1 to 128 letters, digits,
    dots, dashes and underscores."""
    return given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"
