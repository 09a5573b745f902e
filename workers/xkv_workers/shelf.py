"""The store as a run sees it: what is there already, and who works on what."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact, UnsupportedFormat
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_workers.low_fidelity import Standard
from xkv_workers.messages import PrefixJob, Stored

LEASE_SECONDS = 15.0
"""A dead driver's documents are free again after so long; a live one renews three times in it."""


@dataclass(frozen=True)
class _Found:
    stored: Stored
    manifest: PrefixManifest


class Shelf:
    """One run's view of a store. As a context manager it gives its leases back at the end.

    Args:
        standard: which of the stored artifacts are low, and whether those are compressed again.
        pin, ttl_s: what is promised of those that are used as they are.
    """

    def __init__(
        self, store: ArtifactStore, standard: Standard, *, pin: bool = False, ttl_s: float | None = None
    ) -> None:
        self._store, self._standard, self._pin, self._ttl_s = store, standard, pin, ttl_s
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
        planned, or again because its fidelity was low. One that is low and for which nothing else was tried
        yet is not found where low ones are compressed again.
        """
        found = self._find(job.artifact_id)
        if found is not None and (found.manifest.retried or not (found.stored.low and job.retry_ids)):
            return found.stored
        for retry_id in job.retry_ids:
            again = self._find(retry_id)
            # Else it has these settings by somebody's wish, not for want of fidelity.
            if again is not None and again.manifest.instead_of == job.artifact_id:
                return replace(again.stored, artifact_id=job.artifact_id, retry_id=retry_id)
        return None

    def keep(self, stored: Stored) -> bool:
        """Promise of a stored artifact what the run promises; False where it was collected meanwhile."""
        try:
            if self._pin:
                self._store.pin(stored.own_id)
            if self._ttl_s is not None:
                self._store.set_ttl(stored.own_id, self._ttl_s)
        except ArtifactNotFound:
            return False
        return True

    def _find(self, artifact_id: str) -> _Found | None:
        try:
            entry = self._store.get(artifact_id)
            if entry is None:
                return None
            manifest = self._store.manifest(artifact_id)
        except (ArtifactNotFound, CorruptArtifact, UnsupportedFormat):  # computing it again replaces the blob
            return None
        fidelity = manifest.fidelity
        low = self._standard.is_low(fidelity, manifest.spec.get("ratio"))
        sizes = entry.tokens, entry.bytes_full, entry.bytes
        return _Found(Stored(artifact_id, *sizes, fidelity.top1_agreement, fidelity.kl, low=low), manifest)

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
