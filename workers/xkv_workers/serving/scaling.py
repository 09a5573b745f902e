"""`Scaling`: how many engine replicas a server has, and how their number follows the requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer

_REPORTED_S = 10.0
"""Ray's ingress says so often how many requests there are."""
_LEAST_LOOK_BACK_S, _MOST_LOOK_BACK_S = 1.2 * _REPORTED_S, 30.0


@dataclass(frozen=True)
class Scaling:
    """From how many to how many replicas, and when one comes or goes.

    Args:
        least, most: replicas.
        target_requests: requests, running and waiting, for each replica: where there are more, another one
            comes, and where fewer replicas have no more, one goes. None: a full batch.
        upscale_delay_s, downscale_delay_s: how long that must have been so.

    Raises:
        InvalidSpec: a value out of range.
    """

    least: int = 1
    most: int = 1
    target_requests: int | None = None
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("least", "most", "target_requests"):
            value = getattr(self, name)
            if value is not None and (not is_integer(value) or value < 1):
                raise InvalidSpec(f"{name}={value!r} is out of range", hint="use an integer from 1")
        if self.most < self.least:
            raise InvalidSpec(f"most={self.most} is below least={self.least}", hint="give at least as many")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidSpec(f"{name}={getattr(self, name)!r} is out of range", hint="use 0 or more")

    @property
    def look_back_s(self) -> float:
        """Seconds over which requests are averaged: no longer than a replica is waited for anyway."""
        return min(max(self.upscale_delay_s, _LEAST_LOOK_BACK_S), _MOST_LOOK_BACK_S)
