"""`CatalogUpkeep`: what a pool of resident prefixes tells the catalog now and then, and asks it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from xkv_artifacts.catalog import Catalog
from xkv_artifacts.errors import CatalogError, CatalogUnavailable

EVERY_S = 10.0
"""A pin that is set or taken back shows so late in memory; what is used must not look idle for long."""


class CatalogUpkeep:
    """Every 10 s, on a thread of its own, notes in the catalog what was used, and asks what is pinned.

    Args:
        catalog: of the store.
        asked: names the artifacts to ask about.
        on_pins: told of each whether it is pinned, on that thread or on the one that calls `ask`.
    """

    def __init__(
        self,
        catalog: Catalog,
        asked: Callable[[], Sequence[str]],
        on_pins: Callable[[Mapping[str, bool]], None],
    ) -> None:
        self._catalog, self._asked, self._on_pins = catalog, asked, on_pins
        self._used: set[str] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        threading.Thread(target=self._run, name="prefix-pool-upkeep", daemon=True).start()

    def used(self, artifact_id: str) -> None:
        """Note later that a prefix was used: in memory it must not look idle to collectors."""
        with self._lock:
            self._used.add(artifact_id)

    def ask(self, ids: Sequence[str]) -> None:
        """Ask about some artifacts now; where Redis does not answer, what was known stays."""
        if not ids:
            return
        with suppress(CatalogUnavailable, CatalogError):
            pinned = self._catalog.pinned(ids)
            self._on_pins({artifact_id: artifact_id in pinned for artifact_id in ids})

    def close(self) -> None:
        """Stop, without waiting for a question that is open."""
        self._ending.set()

    def _run(self) -> None:
        while not self._ending.wait(EVERY_S):
            with self._lock:
                used, self._used = self._used, set()
            with suppress(CatalogUnavailable, CatalogError):
                for artifact_id in used:
                    self._catalog.touch(artifact_id)
            self.ask(self._asked())
