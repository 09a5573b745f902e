"""The store as a run sees it: what is there already, and who works on what."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from xkv_artifacts.errors import UnsupportedFormat
from xkv_artifacts.store import ArtifactStore
from xkv_workers.messages import PrefixJob, Stored

LEASE_SECONDS = 15.0
"""A dead driver's documents are free again after so long; a live one renews three times in it."""


class Shelf:
    """One run's view of a store. As a context manager it gives its leases back at the end."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._leases: dict[str, ExitStack] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for artifact_id in list(self._leases):
            self.release(artifact_id)

    def find(self, job: PrefixJob) -> Stored | None:
        """The job's artifact, when its blob is in the store (it is listed in the catalog then): compressed as
        planned, or again because its fidelity was low.
        """
        found = self._find(job.artifact_id)
        if found is not None or job.retry_id is None:
            return found
        again = self._find(job.retry_id)
        if again is None or self._store.manifest(job.retry_id).instead_of != job.artifact_id:
            return None  # of these settings by somebody's wish, not for want of fidelity
        return replace(again, artifact_id=job.artifact_id, retry_id=job.retry_id)

    def _find(self, artifact_id: str) -> Stored | None:
        try:
            entry = self._store.get(artifact_id)
        except UnsupportedFormat:  # computing it again replaces the blob by one that can be read
            return None
        if entry is None:
            return None
        return Stored(artifact_id, entry.tokens, entry.bytes_full, entry.bytes, entry.fidelity)

    def lease(self, artifact_id: str) -> bool:
        """Take and keep the lease on an artifact; False when another process has it."""
        lease = self._store.catalog.lease(artifact_id, self._owner, LEASE_SECONDS)
        if lease is None:
            return False
        held = self._leases[artifact_id] = ExitStack()
        held.enter_context(lease)
        return True

    def is_leased(self, artifact_id: str) -> bool:
        """Whether some process works on it."""
        return self._store.catalog.lease_owner(artifact_id) is not None

    def release(self, artifact_id: str) -> None:
        """Give the lease back."""
        self._leases.pop(artifact_id).close()
