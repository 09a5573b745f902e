"""`ServeSettings`: a server as its processes need to know it. Plain values that cross to Ray's workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from xkv_service.api.keys import KeyRing
from xkv_service.api.settings import APISettings
from xkv_service.engine.settings import EngineSettings
from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer
from xkv_service.spec import DEFAULT_RATIO
from xkv_workers.messages import ModelPlace
from xkv_workers.serving.logs import LogFormat
from xkv_workers.serving.scaling import Scaling

APP = "xkv"
ENGINE = "engine"
INGRESS = "ingress"
COMPRESSOR = "compressor"

_CLOSING_S = 30.0
"""A replica without requests ends within: its engine's last step, and what waits to be stored."""
_ROUNDS = 16
"""Answers that may wait for each one that can run: the last begins after so many times what one takes."""


def most_requests_each(engine: EngineSettings) -> int:
    """Requests under way at once, for each replica that may come."""
    return (1 + _ROUNDS) * engine.max_running


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and how much of it.

    Args:
        place: the model and the store. aliases: names of the model besides its own.
        engine, api: limits of each replica's engine and of the HTTP side.
        ratio: of prefixes that are made here and ask for none.
        prefix_bytes: budget of each replica for resident prefixes.
        scaling: how many engine replicas there are.
        keys: who may enter. log_format: of all its processes.

    Raises:
        InvalidSpec: a number out of range.
    """

    place: ModelPlace
    aliases: tuple[str, ...] = ()
    engine: EngineSettings = field(default_factory=EngineSettings)
    api: APISettings = field(default_factory=APISettings)
    ratio: float = DEFAULT_RATIO
    prefix_bytes: int = 2**30
    scaling: Scaling = field(default_factory=Scaling)
    keys: KeyRing = field(default_factory=KeyRing)
    log_format: LogFormat = "json"

    def __post_init__(self) -> None:
        if not is_integer(self.prefix_bytes) or self.prefix_bytes < 1:
            raise InvalidSpec(
                f"prefix_bytes={self.prefix_bytes!r} is out of range", hint="use an integer from 1"
            )

    @property
    def ongoing(self) -> int:
        """Requests that a replica takes before others spill over to the next one, or wait for one of them."""
        return 2 * self.engine.max_running

    @property
    def most_requests(self) -> int:
        """Requests under way at once, of all replicas that may come; more are refused."""
        return most_requests_each(self.engine) * self.scaling.most

    @property
    def target_requests(self) -> int:
        """Requests, running and waiting, for each replica that there is."""
        return self.scaling.target_requests or self.engine.max_running

    @property
    def drain_s(self) -> float:
        """How long a replica that leaves may take: for the longest answer, and for its tails to be stored."""
        return self.api.request_timeout_s + _CLOSING_S
