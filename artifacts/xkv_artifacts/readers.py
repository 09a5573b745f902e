"""Marks of who reads a blob now, in Redis: no collector, on whatever machine, deletes what is marked.

A mark runs out when its reader died. While Redis does not answer, reading goes on without one: a collector
cannot drop anything then either.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final, Protocol

from xkv_artifacts.errors import ArtifactNotFound, CatalogError, CatalogUnavailable

MARK_S: Final = 30.0
"""How long a dead reader's mark keeps collectors away; a live one renews it three times in it."""


class Marks(Protocol):
    """Where marks are kept: `Catalog` and `TailIndex` say what the methods do."""

    def mark_read(self, artifact_id: str, reader: str, ttl_s: float) -> bool:
        """Mark a blob as read; False where its time is over."""

    def unmark_read(self, artifact_id: str, reader: str) -> None:
        """Take a mark back."""

    def renew_reads(self, marks: Mapping[str, str], ttl_s: float) -> None:
        """Let marks last again."""


class Readers:
    """The reads that this process does of one store. Safe to use from several threads.

    Args:
        catalog: keeps the marks.
        mark_s: seconds after which the marks of a process that died run out.
    """

    def __init__(self, catalog: Marks, mark_s: float = MARK_S) -> None:
        self._catalog = catalog
        self._mark_s = mark_s
        self._process = f"{socket.gethostname()}:{os.getpid()}"
        self._marks: dict[str, str] = {}  # artifact by mark: each read has its own
        self._lock = threading.Lock()
        self._none_left = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def hold(self, artifact_id: str) -> Iterator[None]:
        """Keep collectors away from a blob while the block runs; it counts as used now.

        Raises:
            ArtifactNotFound: its time is over.
        """
        mark = f"{self._process}:{uuid.uuid4().hex}"
        with suppress(CatalogUnavailable, CatalogError):
            if not self._catalog.mark_read(artifact_id, mark, self._mark_s):
                raise ArtifactNotFound(
                    f"artifact {artifact_id}: its time to live is over", hint="compute it again"
                )
        self._add(mark, artifact_id)
        try:
            yield
        finally:
            self._remove(mark)
            with suppress(CatalogUnavailable, CatalogError):
                self._catalog.unmark_read(artifact_id, mark)

    def _add(self, mark: str, artifact_id: str) -> None:
        with self._lock:
            self._marks[mark] = artifact_id
            self._none_left.clear()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._renew, name="xkv-readers", daemon=True)
                self._thread.start()

    def _remove(self, mark: str) -> None:
        with self._lock:
            del self._marks[mark]
            if not self._marks:
                self._none_left.set()

    def _renew(self) -> None:
        """Renew all marks at once, until none was held for a while."""
        while True:
            waited = self._none_left.wait(self._mark_s / 3)
            with self._lock:
                marks = dict(self._marks)
                if waited and not marks:
                    self._thread = None
                    return
            with suppress(CatalogUnavailable, CatalogError):
                self._catalog.renew_reads(marks, self._mark_s)
