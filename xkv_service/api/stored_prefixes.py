"""`StoredPrefixes`: a `PrefixService` over a store, and somebody who makes what is not in it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixPage, PrefixRecord
from xkv_service.api.prefix_records import PrefixRecords

_PATIENCE_S = 2.0
"""A new prefix waits so long for a Redis that does not answer: an embedded one is brought back meanwhile."""


class Maker(Protocol):
    """Makes prefixes, here or elsewhere."""

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""


class StoredPrefixes:
    """A `PrefixService`. It keeps nothing itself: any number of them over one store tell the same."""

    def __init__(self, store: ArtifactStore, maker: Maker) -> None:
        self._store, self._maker = store, maker
        self._records = PrefixRecords(store)

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""
        link = self._store.catalog.link
        await asyncio.to_thread(link.call, lambda client: client.ping(), patience_s=_PATIENCE_S)
        return await self._maker.create(new)

    async def page(self, namespace: str, after: str | None, limit: int) -> PrefixPage:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._records.page, namespace, after, limit)

    async def get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._records.get, namespaces, prefix_id)

    async def change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._records.change, namespaces, prefix_id, changes)

    async def delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._records.delete, namespaces, prefix_id)
