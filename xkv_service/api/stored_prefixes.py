"""`StoredPrefixes`: a `PrefixService` over a store, and somebody who makes what is not in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from xkv_artifacts.errors import CatalogUnavailable
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixPage, PrefixRecord
from xkv_service.api.prefix_records import PrefixRecords

_PATIENCE_S = 2.0
"""A new prefix waits so long for a Redis that does not answer: an embedded one is brought back meanwhile."""

_THREADS = 8
"""Calls at once. Where Redis hangs, each keeps its thread until the link gives up; more wait behind them."""
_CALL_S = 30.0
"""Until somebody is told that the store does not answer: it may have files to delete, behind a slow link."""
Result = TypeVar("Result")


class Maker(Protocol):
    """Makes prefixes, here or elsewhere."""

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""


class StoredPrefixes:
    """A `PrefixService`. It keeps nothing itself: any number of them over one store tell the same.

    It has threads of its own: a store that hangs holds up nobody who asks for something else.
    """

    def __init__(self, store: ArtifactStore, maker: Maker) -> None:
        self._store, self._maker = store, maker
        self._records = PrefixRecords(store)
        self._threads = ThreadPoolExecutor(_THREADS, "xkv-prefixes")

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""
        link = self._store.catalog.link
        await self._call(lambda: link.call(lambda client: client.ping(), patience_s=_PATIENCE_S))
        return await self._maker.create(new)

    async def page(self, namespace: str, after: str | None, limit: int) -> PrefixPage:
        """As `PrefixService`."""
        return await self._call(lambda: self._records.page(namespace, after, limit))

    async def get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        """As `PrefixService`."""
        return await self._call(lambda: self._records.get(namespaces, prefix_id))

    async def change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        """As `PrefixService`."""
        return await self._call(lambda: self._records.change(namespaces, prefix_id, changes))

    async def delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        """As `PrefixService`."""
        return await self._call(lambda: self._records.delete(namespaces, prefix_id))

    def close(self) -> None:
        """As `PrefixService`."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, ask: Callable[[], Result]) -> Result:
        """What the store answers. One that nobody waits for any more, and that has not begun, is left out."""
        asked = asyncio.wrap_future(self._threads.submit(ask))
        try:
            return await asyncio.wait_for(asked, _CALL_S)
        except asyncio.TimeoutError:
            if not asked.cancelled():  # the store's own
                raise
            message = f"the store has not answered within {_CALL_S:g} s"
            raise CatalogUnavailable(message, hint="what was asked for may still be done") from None
