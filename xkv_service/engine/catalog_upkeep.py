"""`CatalogUpkeep`: what a pool of resident prefixes tells the catalog now and then, and asks it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from xkv_artifacts.errors import CatalogError, CatalogUnavailable, StoreError
from xkv_artifacts.store import ArtifactStore, Standing

EVERY_S = 10.0
"""A pin or a deletion shows so late in memory; what is used must not look idle for long."""


class CatalogUpkeep:
    """Every 10 s, on a thread of its own, notes in the catalog what was used, and asks what is pinned
    or gone.

    Args:
        store: whose catalog.
        asked: names the artifacts to ask about.
        on_standings: told how each stands, on that thread or on the one that calls `ask`.
    """

    def __init__(
        self,
        store: ArtifactStore,
        asked: Callable[[], Sequence[str]],
        on_standings: Callable[[Mapping[str, Standing]], None],
    ) -> None:
        self._store, self._asked, self._on_standings = store, asked, on_standings
        self._used: set[str] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        threading.Thread(target=self._run, name="prefix-pool-upkeep", daemon=True).start()

    def used(self, artifact_id: str) -> None:
        """Note later that a prefix was used: in memory it must not look idle to collectors."""
        with self._lock:
            self._used.add(artifact_id)

    def ask(self, ids: Sequence[str]) -> None:
        """Ask about some artifacts now; where the store does not answer, what was known stays."""
        if not ids:
            return
        with suppress(CatalogUnavailable, CatalogError, StoreError):
            self._on_standings(self._store.standings(ids))

    def close(self) -> None:
        """Stop, without waiting for a question that is open."""
        self._ending.set()

    def _run(self) -> None:
        while not self._ending.wait(EVERY_S):
            with self._lock:
                used, self._used = self._used, set()
            with suppress(CatalogUnavailable, CatalogError):
                for artifact_id in used:
                    self._store.catalog.touch(artifact_id)
            self.ask(self._asked())
