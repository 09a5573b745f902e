"""Making and changing what is promised of an artifact: its file in the store, and the catalog's copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias

from xkv_artifacts.blobs import BlobStore, not_found
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.errors import CatalogError, CatalogUnavailable
from xkv_artifacts.retention import NO_PROMISE, Retention, RetentionShelf

Change: TypeAlias = Callable[[Retention, float], Retention]
"""What becomes of a promise, at a second since the epoch."""


class Promises:
    """What is promised of the artifacts of one store."""

    def __init__(self, blobs: BlobStore, catalog: Catalog, shelf: RetentionShelf) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._shelf = shelf

    def current(self, artifact_id: str) -> tuple[Retention, float]:
        """What holds for a blob that is new now, and the time. What ended in an earlier life of the id is
        forgotten.
        """
        now = self._catalog.now()
        retention = self._shelf.get(artifact_id)
        if retention.over(now):
            self._shelf.remove(artifact_id)
            return NO_PROMISE, now
        return retention, now

    @contextmanager
    def of_new(self, artifact_id: str, pinned: bool, ttl_s: float | None) -> Iterator[None]:
        """Promise something of an artifact whose blob is written in the block: it is never without. Where
        that fails, what was promised before holds again.

        Raises:
            InvalidLimits, CatalogUnavailable, StoreError
        """
        if not pinned and ttl_s is None:
            yield
            return
        old, now = self.current(artifact_id)
        new = old.model_copy(update={"pinned": old.pinned or pinned})
        self._shelf.put(artifact_id, new if ttl_s is None else new.with_ttl(ttl_s, now))
        try:
            yield
        except BaseException:
            self._shelf.put(artifact_id, old)
            raise

    def change(self, artifact_id: str, change: Change) -> Retention:
        """Change what is promised of a stored artifact; one at a time.

        Raises:
            ArtifactNotFound: it was collected meanwhile.
            CatalogUnavailable, CatalogError, StoreError, InvalidLimits
        """
        with self._catalog.changing(artifact_id):
            old = self._shelf.get(artifact_id)
            new = change(old, self._catalog.now())
            # The catalog first: what a collector dropped before is told, and one that comes later sees it.
            if not self._catalog.retain(artifact_id, new):
                raise not_found(artifact_id, self._blobs)
            try:
                self._shelf.put(artifact_id, new)
            except BaseException:
                with suppress(CatalogUnavailable, CatalogError):
                    self._catalog.retain(artifact_id, old)
                raise
        return new

    def forget(self, artifact_id: str) -> None:
        """Promise nothing of an artifact that is not there."""
        self._shelf.remove(artifact_id)

    def sweep(self) -> None:
        """Delete the files of artifacts that are not there and that would have ended; a pin stays, for the
        artifact that is computed again.
        """
        now = self._catalog.now()
        for artifact_id in self._shelf.ids():
            if not self._blobs.exists(artifact_id) and self._shelf.get(artifact_id).over(now):
                self._shelf.remove(artifact_id)
