"""`DamageNotes`: what is noted as damaged or missing, for a process that is asked about prompts."""

from __future__ import annotations

import time
from contextlib import suppress

from xkv_artifacts.damage_board import Note
from xkv_artifacts.errors import CatalogUnavailable
from xkv_artifacts.store import ArtifactStore

LOOK_S = 10.0
"""Between two looks: as long as it takes until a replica's memory follows the catalog."""


class DamageNotes:
    """The store's `DamageBoard`, read again when what was read is 10 s old. For any thread."""

    def __init__(self, store: ArtifactStore) -> None:
        self._board = store.damaged
        self._notes: dict[str, Note] = {}
        self._old_at = 0.0  # monotonic

    def all(self) -> dict[str, Note]:
        """What is noted, by artifact; as before where Redis does not answer."""
        now = time.monotonic()
        if now >= self._old_at:
            self._old_at = now + LOOK_S
            with suppress(CatalogUnavailable):
                self._notes = self._board.all()
        return dict(self._notes)

    def look_again(self) -> None:
        """At the next prompt: this process has just found something itself."""
        self._old_at = 0.0

    def get(self, artifact_id: str) -> Note:
        """What is noted of one now."""
        with suppress(CatalogUnavailable):
            return self._board.get(artifact_id) or Note()
        return Note()

    def take(self, artifact_id: str) -> bool:
        """Whether one was still noted; it is not any more."""
        self._notes.pop(artifact_id, None)
        with suppress(CatalogUnavailable):
            return self._board.take(artifact_id)
        return False
