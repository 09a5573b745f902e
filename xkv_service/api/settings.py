"""`APISettings`: what the HTTP server accepts, and how long it waits. docs/serving.md has reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xkv_artifacts.keys import check_namespace
from xkv_service.errors import InvalidSpec

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine that no other one can be reached by."""


@dataclass(frozen=True)
class APISettings:
    """Limits of the server.

    Args:
        max_body_bytes: larger request bodies are refused (413). body_timeout_s: for a body to arrive (408).
        max_held_bytes: of the bodies of all requests under way; what would be more is refused (503). Of one
            key of several a quarter (429).
        request_timeout_s: from a request to the end of its answer (504).
        queue_timeout_s: for a replica with room, and there again until the prompt is begun (503); 0: as long
            as `request_timeout_s`.
        max_answer_tokens: longest answer, and of a chat that asks for none in particular.
        min_match_tokens: stored prefixes that share fewer tokens with a prompt are not used.
        min_fidelity: top-1 agreement below which artifacts are not used; 0 uses all that were published.
        part_kl: nats of divergence up to which a part of an artifact is used where all of it takes too long
            to load; 0: none is.
        lookup_timeout_s: for the catalog to answer.
        lookup_pause_s: how long the catalog is left alone when it did not.
        public_namespace: whose prefixes every key may use.
        open_network: serve other machines although no keys are configured.
        published: where a container's port mapping, or a proxy, lets clients in, whose own addresses tell
            nothing then; None: there is none in front.

    Raises:
        InvalidSpec: a value out of range. InvalidNamespace: as `check_namespace`.
    """

    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 30.0
    max_held_bytes: int = 2**30
    request_timeout_s: float = 600.0
    queue_timeout_s: float = 300.0
    max_answer_tokens: int = 4096
    min_match_tokens: int = 64
    min_fidelity: float = 0.9
    part_kl: float = 2.5e-4
    lookup_timeout_s: float = 1.0
    lookup_pause_s: float = 5.0
    public_namespace: str = "public"
    open_network: bool = False
    published: str | None = None

    def __post_init__(self) -> None:
        check_namespace(self.public_namespace)
        for name in (
            *("max_body_bytes", "body_timeout_s", "request_timeout_s", "max_answer_tokens"),
            *("min_match_tokens", "lookup_timeout_s", "lookup_pause_s"),
        ):
            if not getattr(self, name) > 0:
                raise InvalidSpec(f"{name}={getattr(self, name)!r} is out of range", hint="use more than 0")
        if not self.max_held_bytes >= self.max_body_bytes:
            raise InvalidSpec(
                f"max_held_bytes={self.max_held_bytes!r} is out of range",
                hint=f"use max_body_bytes={self.max_body_bytes!r} or more",
            )
        if not 0 <= self.queue_timeout_s < math.inf:
            raise InvalidSpec(
                f"queue_timeout_s={self.queue_timeout_s!r} is out of range",
                hint="use seconds, or 0 for no limit",
            )
        if not 0.0 <= self.part_kl < math.inf:
            raise InvalidSpec(f"part_kl={self.part_kl!r} is out of range", hint="use nats, or 0 for no parts")
        if not 0.0 <= self.min_fidelity <= 1.0:
            raise InvalidSpec(f"min_fidelity={self.min_fidelity!r} is out of range", hint="use 0 to 1")
