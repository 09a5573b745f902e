"""`PrefixRecords`: the prefixes of a store, those that are being made or failed among them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CorruptArtifact,
    InvalidCursor,
    MissingBlob,
    UnsupportedFormat,
)
from xkv_artifacts.jobs import Job, Publication
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import PrefixChanges, PrefixPage, PrefixRecord, PrefixStatus


class PrefixRecords:
    """What `PrefixService` tells and changes: whoever opens the same store sees the same. What is stored is
    ready, whatever a job's record says.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def page(self, namespace: str, after: str | None, limit: int) -> PrefixPage:
        """As `PrefixService`."""
        cursor = None if after is None else self._store.catalog.namespaces.cursor_of(namespace, after)
        records = [] if cursor else self._waiting(namespace, after)
        while len(records) <= limit:  # what has ended is left out of the store's own pages
            entries, cursor = self._store.page(namespace, cursor, limit + 1 - len(records))
            records += map(_of_entry, entries)
            if cursor is None:
                break
        return PrefixPage(records[:limit], len(records) > limit)

    def _waiting(self, namespace: str, after: str | None) -> list[PrefixRecord]:
        """Those that are being made or failed, or only those that follow one of them."""
        jobs = self._store.jobs.all(namespace)
        made = {entry.id for entry in self._store.catalog.entries(ids=[job.id for job in jobs])}
        left = [job for job in jobs if job.id not in made]
        if after is None:
            return [*map(of_job, left)]
        ids = [job.id for job in left]
        if after not in ids:
            message = f"no prefix {after[:80]!r} in the list to go on after"
            raise InvalidCursor(message, hint="give the last id of the page before, or list from the start")
        return [*map(of_job, left[ids.index(after) + 1 :])]

    def get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        """As `PrefixService`."""
        # In this order: a job ends after its artifact is stored.
        jobs = [job for name in namespaces if (job := self._store.jobs.get(name, prefix_id)) is not None]
        entry = self._entry(namespaces, prefix_id)
        if entry is not None:
            return _of_entry(entry)
        return of_job(jobs[0]) if jobs else None

    def change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        """As `PrefixService`."""
        for namespace in namespaces:
            self._store.jobs.change(namespace, prefix_id, pinned=changes.pinned, ttl_s=changes.ttl_s)
        if self._entry(namespaces, prefix_id) is not None:
            try:
                if changes.ttl_s is not None:
                    self._store.set_ttl(prefix_id, changes.ttl_s or None)
                if changes.pinned is not None:
                    (self._store.pin if changes.pinned else self._store.unpin)(prefix_id)
            except ArtifactNotFound:  # collected in between
                return None
        return self.get(namespaces, prefix_id)

    def delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        """As `PrefixService`."""
        jobs = [self._store.jobs.remove(namespace, prefix_id) for namespace in namespaces]
        if not is_artifact_id(prefix_id):
            return False
        own = self._store.catalog.namespaces.holds(namespaces, prefix_id)
        stored = self._entry(namespaces, prefix_id) is not None and self._store.remove(prefix_id)
        # What was deleted is not made again, though it was damaged or missing before.
        missing = self._store.damaged.take_own(prefix_id, namespaces, held=own) and own
        return stored or missing or any(jobs)

    def remove_left(self) -> int:
        """Remove what jobs published that were deleted meanwhile and whose makers died before they saw it;
        how many artifacts.

        Raises:
            CatalogUnavailable, CatalogError, StoreError
        """
        return sum(map(self._end, self._store.jobs.publications()))

    def _end(self, found: Publication) -> bool:
        """End a deleted job that nobody is at; whether what it published was removed."""
        lease = self._store.catalog.lease(found.id, f"end-{uuid.uuid4().hex}")
        if lease is None:
            return False
        with lease:
            job = self._store.jobs.last(found.namespace, found.id)
            if job is not None and job.status != "deleted":
                return False  # it was asked for again, or may be
            removed = job is not None and self._made(found.id) == found.made and self._store.remove(found.id)
            self._store.jobs.finish(found.namespace, found.id, deleted=True)
        return removed

    def _made(self, prefix_id: str) -> float | None:
        try:
            return self._store.manifest(prefix_id).created.timestamp()
        except MissingBlob:  # nobody wants it
            self._store.damaged.take(prefix_id)
        except (ArtifactNotFound, CorruptArtifact, UnsupportedFormat):
            pass
        return None

    def _entry(self, namespaces: Sequence[str], prefix_id: str) -> Entry | None:
        """The entry of a stored prefix in these namespaces; nothing more is read of another one."""
        if not is_artifact_id(prefix_id):
            return None
        if not self._store.catalog.namespaces.holds(namespaces, prefix_id):
            return None
        entry = self._store.get(prefix_id)
        return entry if entry is not None and entry.namespace in namespaces else None


def of_job(job: Job) -> PrefixRecord:
    """A prefix that is not there (yet)."""
    status: PrefixStatus = "failed" if job.status == "deleted" else job.status
    return PrefixRecord(
        id=job.id,
        namespace=job.namespace,
        status=status,
        model=job.model,
        tokens=job.tokens,
        name=job.name,
        created=job.created,
        ttl_s=job.ttl_s,
        pinned=job.pinned,
        error=job.error or None,
    )


def _of_entry(entry: Entry) -> PrefixRecord:
    return PrefixRecord(
        id=entry.id,
        namespace=entry.namespace,
        status="ready",
        model=entry.model,
        tokens=entry.tokens,
        name=entry.document,
        created=entry.created,
        fingerprint=entry.fingerprint,
        bytes=entry.bytes,
        ratio=entry.ratio,
        fidelity=entry.fidelity,
        kl=entry.kl,
        kl_limit=entry.kl_limit,
        expires=entry.expires,
        pinned=entry.pinned,
    )
