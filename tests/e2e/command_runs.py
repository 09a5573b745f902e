"""What the end-to-end tests say and hear: documents to read, and how a command ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATIENT_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_register_timeout_seconds": "600"}
"""Environment of a Ray on a slow machine, where a worker's imports alone may take its usual minute."""


@dataclass(frozen=True)
class Done:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert "Traceback" not in self.err, self.err
        result = json.loads(self.out)
        assert isinstance(result, dict)
        return result


def words(count: int, seed: int = 0) -> str:
    """Readable text of `count` characters or a few more, different for each seed."""
    lines: list[str] = []
    length = 0
    number = 7919 * (seed + 1)
    while length < count:
        number = (number * 48271) % 2147483647
        lines.append(f"The access code of office {number % 977} is {number % 100000:05d}.")
        length += len(lines[-1]) + 1
    return "\n".join(lines)


Xkv = Callable[..., Done]
