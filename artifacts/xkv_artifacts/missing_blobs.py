"""Artifacts that the catalog lists and whose blobs are gone, though nobody deleted them.

Every deletion drops the entry before the blob. So an entry without a blob says that the blob was lost: its
file was removed by hand, or with its disk. What was deleted or has ended is never taken for lost, and neither
is anything in a store that is not there itself: a folder that is not mounted looks like one that lost all.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress

from xkv_artifacts.blobs import STORE_FILE, BlobStore
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.damage_board import DamageBoard
from xkv_artifacts.errors import CatalogError, CatalogUnavailable, StoreError
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.retention import NO_PROMISE, Retention, RetentionShelf

_log = logging.getLogger(__name__)


class MissingBlobs:
    """Tells lost blobs of one store from deleted ones."""

    def __init__(
        self, blobs: BlobStore, catalog: Catalog, retention: RetentionShelf, board: DamageBoard
    ) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._retention = retention
        self._board = board

    def note(self, artifact_id: str) -> bool:
        """A blob was not found: whether it is lost. Then it is noted, not listed any more, and its pin and
        end stay. True for one of those who ask at once; False also where it is there again, or Redis is not.

        Raises:
            StoreError: the catalog lists it, and the store itself is not there.
        """
        if not is_artifact_id(artifact_id) or self._blobs.exists(artifact_id):
            return False
        with suppress(CatalogUnavailable, CatalogError):
            if self._catalog.listed([artifact_id])[artifact_id] == "unlisted":
                return False
            self._check_store()
            promised = self._catalog.miss(artifact_id)
            return promised is not None and self._keep(artifact_id, promised)
        return False

    def _keep(self, artifact_id: str, promised: Retention) -> bool:
        """Keep what was promised of a lost artifact; False where its time is over by what the store says."""
        kept = self._retention.get(artifact_id)
        if kept == NO_PROMISE and promised != NO_PROMISE:  # its file went with the blob
            self._retention.put(artifact_id, promised)
        elif kept.over(self._catalog.now()):
            self._board.take(artifact_id)
            return False
        return True

    def log(self, artifact_id: str) -> bool:
        """As `note`, for those who go on without an error: what was lost is told in the log."""
        lost = self.note(artifact_id)
        if lost:
            _log.warning("%s", self.message(artifact_id))
        return lost

    def message(self, artifact_id: str) -> str:
        """One line that says what is wrong with a lost blob."""
        return f"artifact {artifact_id} is missing: its file is gone from {self._blobs.url}"

    def _check_store(self) -> None:
        content = self._blobs.root_file(STORE_FILE)
        with suppress(ValueError, AttributeError, RecursionError):
            if json.loads(content or b"{}").get("id") == self._catalog.store_id:
                return
        raise StoreError(
            f"{self._blobs.url} is not the store that it was: its {STORE_FILE} is gone or another's",
            hint="mount it again",
        )
