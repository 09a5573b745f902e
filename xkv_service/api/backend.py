"""What the HTTP app needs of whatever runs the model (`Backend`) and keeps prefixes (`PrefixService`):
an engine and a store here, or replicas elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from xkv_service.engine.messages import EngineState, Event, GenerationRequest
from xkv_service.spec import CompressionSpec

PrefixStatus = Literal["queued", "running", "ready", "failed"]


class Backend(Protocol):
    """Runs requests. Every method may be called by many requests at once, on one event loop."""

    @property
    def waiting(self) -> int:
        """Requests that no engine has got yet."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of one request. Closing the iterator cancels the request within a step."""

    async def states(self) -> list[EngineState]:
        """What each engine holds and does now; empty while none can answer."""


@dataclass(frozen=True)
class NewPrefix:
    """A prefix to compress and store.

    Args:
        namespace: whose it will be. token_ids: all of it.
        name: what people call it. sha256: of what it was made from.
        ratio: as `CompressionSpec.ratio`; None: the server's. spec: used as it is, whatever the ratio
            says, where its calibration can be; else its ratio is.
        ttl_s: seconds until it may be deleted; None: no end of its own. pinned: keep it whatever happens.
        replaces: an artifact that was lost: its pin and its end are this one's, also under another id.
        wait_s: seconds in which it may turn up by itself; it is not made sooner.
    """

    namespace: str
    token_ids: Sequence[int] = field(repr=False)
    name: str
    sha256: str
    ratio: float | None = None
    ttl_s: float | None = None
    pinned: bool = False
    spec: CompressionSpec | None = None
    replaces: str | None = None
    wait_s: float = 0.0


@dataclass(frozen=True)
class PrefixRecord:
    """A stored prefix, or one that is being made.

    Args:
        id: its artifact's, known before it is made. model: the name of its model. tokens: of the prefix.
        created: seconds since the epoch, when it was asked for or, once it is ready, made.
        fingerprint: of the model that made it, once it is ready.
        bytes: stored. ratio: bytes of the exact cache / bytes stored. fidelity: top-1 agreement with it.
        kl: divergence from it (nats). kl_limit: above which it is low, by the calibration it was made with.
        expires: seconds since the epoch, once it is ready, or None. ttl_s: seconds that it is kept from when
            it is ready, until it is, or None. error: why it failed.
    """

    id: str
    namespace: str
    status: PrefixStatus
    model: str
    tokens: int
    name: str
    created: float
    fingerprint: str | None = None
    bytes: int | None = None
    ratio: float | None = None
    fidelity: float | None = None
    kl: float | None = None
    kl_limit: float | None = None
    expires: float | None = None
    ttl_s: float | None = None
    pinned: bool = False
    error: str | None = None


@dataclass(frozen=True)
class PrefixPage:
    """Some prefixes of a namespace, and whether there are more behind them."""

    records: list[PrefixRecord]
    more: bool


@dataclass(frozen=True)
class PrefixChanges:
    """What to change of a prefix; None leaves it. `ttl_s` counts from now, of a prefix that is not ready yet
    from when it is, and 0 takes the end away.
    """

    ttl_s: float | None = None
    pinned: bool | None = None


class PrefixService(Protocol):
    """Makes and keeps prefixes. A prefix outside the namespaces that are given does not exist: neither what
    comes back nor the time it takes tells that there is one.

    Every method raises XKVError: StoreError, CatalogUnavailable where the store does not answer.
    """

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """Have a prefix made, unless it is there or being made; returns at once.

        Raises:
            InvalidSpec: it cannot be compressed as asked. Overloaded: too many are waiting.
            QuotaExceeded: its namespace has no room for it.
        """

    async def page(self, namespace: str, after: str | None, limit: int) -> PrefixPage:
        """Some prefixes, those being made or failed first, newest first, then last used first.

        What is made, used or deleted between two pages may be missed, or come twice.

        Args:
            after: the last id of the page before; None: the first page. limit: at most so many.

        Raises:
            InvalidCursor: there is no such prefix (any more) to go on after.
        """

    async def get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        """A prefix, or None."""

    async def change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        """Change a prefix; None when there is none."""

    async def delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        """Delete a prefix, or do not make it any more; False when there is none."""

    def close(self) -> None:
        """Let its threads end."""
