"""Deleting what has ended and what is beyond the limits. The catalog finds it; the store's own files decide.

Before anything is deleted its retention file is read, and before a budget costs an artifact the blobs
themselves are counted: a Redis that lies can hide or reorder, but it cannot have deleted what is pinned, what
has not ended, or more than the budget asks for. The entry goes first, in one step with a look at who reads or
computes the artifact and at whether the limit is still exceeded, so several collectors never delete more than
one would.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

from xkv_artifacts.blobs import CALIBRATIONS, BlobStore
from xkv_artifacts.catalog import Bound, Catalog, Reason
from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import (
    ArtifactNotFound,
    CorruptArtifact,
    QuotaExceeded,
    UnsupportedFormat,
)
from xkv_artifacts.keys import is_artifact_id
from xkv_artifacts.limits import LIMITS_FILE, Limits, Quota
from xkv_artifacts.namespace_index import Usage
from xkv_artifacts.reports import Collection, Excess, Removal
from xkv_artifacts.retention import RetentionShelf

_ATTEMPTS = 10
"""How often room is made for one artifact, where others take it at once."""


class Collector:
    """Collects in one store.

    Args:
        relist: lists a blob in the catalog anew, by what it says itself.
    """

    def __init__(
        self,
        blobs: BlobStore,
        catalog: Catalog,
        retention: RetentionShelf,
        relist: Callable[[str], Entry],
    ) -> None:
        self.blobs = blobs
        self.catalog = catalog
        self.retention = retention
        self.relist = relist

    def collect(self, limits: Limits, *, dry_run: bool = False, only_if_enough: bool = False) -> Collection:
        """See `ArtifactStore.collect`."""
        run = _Run(self, dry_run)
        run.ended()
        for namespace, usage in self.catalog.namespaces.usages().items():
            if not _fits(limits.quota(namespace), usage.bytes, usage.artifacts):
                run.quota(namespace, limits.quota(namespace))
        if limits.budget is not None:
            run.budget(limits.budget, only_if_enough)
        stored = self.catalog.namespaces.total() - (run.bytes if dry_run else 0)
        return Collection(tuple(run.removed), len(run.in_use), stored, tuple(run.excess), dry_run)

    def make_room(self, namespace: str, quota: Quota, size: int, artifact_id: str) -> None:
        """Collect in a namespace until an artifact of `size` bytes fits into its quota.

        Raises:
            QuotaExceeded: it cannot be made to fit; nothing was deleted if that was certain from the start.
        """
        for attempt in range(_ATTEMPTS):
            own = self._own(namespace, artifact_id)
            more, count = size - (own.bytes if own else 0), 0 if own else 1
            usage = self.catalog.namespaces.usage(namespace)
            if _fits(quota, usage.bytes + more, usage.artifacts + count):
                return
            usage = self.check_room(namespace, quota, size, artifact_id)
            run = _Run(self, dry_run=False)
            run.ended(namespace)
            run.quota(namespace, quota, more, count, spare=artifact_id)
            if not run.removed:  # others collect the same, or take what was freed
                time.sleep(0.01 * attempt)
        raise _no_room(namespace, quota, size, usage)

    def check_room(self, namespace: str, quota: Quota, size: int, artifact_id: str) -> Usage:
        """What a namespace holds, where an artifact of `size` bytes could be made to fit into its quota.

        Raises:
            QuotaExceeded: it cannot, whatever is collected.
        """
        own = self._own(namespace, artifact_id)
        usage = self.catalog.namespaces.recount(namespace)
        again = (own.bytes, 1) if own and own.pinned else (0, 0)
        if not _fits(quota, usage.pinned_bytes - again[0] + size, usage.pinned - again[1] + 1):
            raise _no_room(namespace, quota, size, usage)
        return usage

    def _own(self, namespace: str, artifact_id: str) -> Entry | None:
        """The entry that an artifact is to replace."""
        found = self.catalog.entries(ids=[artifact_id])
        return next((entry for entry in found if entry.namespace == namespace), None)


class _Run:
    """One collection: what was removed so far, and what stood in the way."""

    def __init__(self, collector: Collector, dry_run: bool) -> None:
        self._blobs, self._catalog = collector.blobs, collector.catalog
        self._retention, self._relist = collector.retention, collector.relist
        self._dry_run = dry_run
        self._name = f"collector:{uuid.uuid4().hex}"
        self._now = self._catalog.now()
        self.removed: list[Removal] = []
        self._removed_ids: set[str] = set()
        self.excess: list[Excess] = []
        self.in_use: set[str] = set()

    @property
    def bytes(self) -> int:
        """Removed so far."""
        return sum(removal.bytes for removal in self.removed)

    def ended(self, namespace: str | None = None) -> None:
        """What has ended, of one namespace or of all."""
        start = 0
        while page := self._catalog.expired(self._now, start):
            gone = 0
            for entry in self._entries(page):
                if namespace in (None, entry.namespace):
                    gone += self._remove(entry, "expired", 0.0, Bound()) == "dropped"
            start += len(page) - (0 if self._dry_run else gone)

    def quota(self, namespace: str, quota: Quota, size: int = 0, count: int = 0, spare: str = "") -> None:
        """Of a namespace what is longest unused, until it keeps its quota.

        Args:
            size, count: bytes and artifacts that are to come, and must fit too.
            spare: an artifact that is not collected: it is about to be replaced.
        """
        used = self._catalog.namespaces.recount(namespace)
        earlier = [removal for removal in self.removed if self._dry_run and removal.namespace == namespace]
        bound = Bound(
            namespace,
            None if quota.bytes is None else quota.bytes - size,
            None if quota.artifacts is None else quota.artifacts - count,
        )
        over = _above(used.bytes, bound.bytes) - sum(removal.bytes for removal in earlier)
        more = _above(used.artifacts, bound.artifacts) - len(earlier)
        for entry, seen in self._oldest(namespace):
            if over <= 0 and more <= 0:
                break
            answer = self._remove(entry, "quota", seen, bound) if entry.id != spare else "kept"
            if answer == "enough":
                return
            if answer == "dropped":
                over, more = over - entry.bytes, more - 1
        if over > 0 or more > 0:
            self.excess.append(Excess(namespace, max(0, over), max(0, more), used.pinned_bytes))

    def budget(self, budget: int, only_if_enough: bool) -> None:
        """Of the whole store what is longest unused, until it keeps its budget.

        Args:
            only_if_enough: nothing, where it cannot keep the budget whatever is deleted.
        """
        namespaces = self._catalog.namespaces
        fixed = sum(self._blobs.of(CALIBRATIONS).sizes())
        if namespaces.total() + fixed <= budget:
            return
        over = sum(self._blobs.sizes()) + fixed - budget - (self.bytes if self._dry_run else 0)
        if over <= 0:
            namespaces.recount_all()
            return
        if only_if_enough and (pinned := self._pinned()) + fixed > budget:
            self.excess.append(Excess(None, over, 0, pinned, fixed, untouched=True))
            return
        bound = Bound(bytes=budget - fixed)
        for entry, seen in self._oldest(None):
            if over <= 0:
                return
            answer = self._remove(entry, "budget", seen, bound)
            if answer == "enough":
                return
            if answer == "dropped":
                over -= self.removed[-1].bytes
        if over > 0:
            self.excess.append(Excess(None, over, 0, self._pinned(), fixed))

    def _pinned(self) -> int:
        """Bytes of all that is pinned, counted again."""
        namespaces = self._catalog.namespaces
        return sum(namespaces.recount(name).pinned_bytes for name in namespaces.usages())

    def _oldest(self, namespace: str | None) -> Iterator[tuple[Entry, float]]:
        """Entries that are not pinned, longest unused first, each with its last use."""
        start = 0
        while page := dict(self._catalog.oldest(start, namespace)):
            before = len(self.removed)
            for entry in self._entries(list(page)):
                own = namespace in (None, entry.namespace) and entry.id not in self._removed_ids
                if own and not entry.pinned:
                    yield entry, page[entry.id]
            start += len(page) - (0 if self._dry_run else len(self.removed) - before)

    def _entries(self, ids: list[str]) -> list[Entry]:
        """The entries of a page; those that are damaged are made again from their blobs."""
        found = {entry.id: entry for entry in self._catalog.entries(ids=ids)}
        for artifact_id in ids:
            if artifact_id not in found and not self._dry_run and is_artifact_id(artifact_id):
                entry = self._mended(artifact_id)
                if entry is not None:
                    found[artifact_id] = entry
        return [found[artifact_id] for artifact_id in ids if artifact_id in found]

    def _mended(self, artifact_id: str) -> Entry | None:
        if self._catalog.lease_owner(artifact_id) is not None:
            return None  # another collector is deleting it
        try:
            return self._relist(artifact_id)
        except (ArtifactNotFound, CorruptArtifact):
            self._catalog.drop(artifact_id)
        except UnsupportedFormat:
            pass
        return None

    def _remove(self, entry: Entry, reason: Reason, seen: float, bound: Bound) -> str:
        """Delete an artifact: "dropped", or why not (see `Catalog.collect`)."""
        promised = self._retention.get(entry.id)
        if reason == "expired" and not promised.over(self._now):
            answer = "kept"
        elif reason != "expired" and promised.pinned:
            answer = "pinned"
        elif self._dry_run:
            return self._note(entry, reason, entry.bytes)
        else:
            answer = self._catalog.collect(entry.id, reason, seen, self._name, bound)
            if answer == "dropped":
                return self._note(entry, reason, self._delete(entry.id))
            if answer in ("read", "leased"):
                self.in_use.add(entry.id)
            return answer
        if not self._dry_run:  # the catalog said something else than the store
            with suppress(ArtifactNotFound, CorruptArtifact, UnsupportedFormat):
                self._relist(entry.id)
        return answer

    def _note(self, entry: Entry, reason: Reason, size: int) -> str:
        self.removed.append(Removal(entry.id, entry.namespace, size, reason))
        self._removed_ids.add(entry.id)
        return "dropped"

    def _delete(self, artifact_id: str) -> int:
        """Delete blob and retention file of an artifact that is no longer listed; the blob's bytes."""
        try:
            size = 0
            with suppress(ArtifactNotFound):
                size = self._blobs.size(artifact_id)
            # Not durably: what a power cut brings back is not listed, and has its end if it had one, so it is
            # collected again. The file of the end goes last: no blob outlives it.
            self._blobs.remove(artifact_id, durably=False)
            self._retention.remove(artifact_id, durably=False)
            return size
        finally:
            self._catalog.release(artifact_id, self._name)


def _fits(quota: Quota, size: int, artifacts: int) -> bool:
    return (quota.bytes is None or size <= quota.bytes) and (
        quota.artifacts is None or artifacts <= quota.artifacts
    )


def _above(used: int, most: int | None) -> int:
    return 0 if most is None else used - most


def _no_room(namespace: str, quota: Quota, size: int, usage: Usage) -> QuotaExceeded:
    allowed = [] if quota.bytes is None else [f"{quota.bytes:,} bytes"]
    allowed += [] if quota.artifacts is None else [f"{quota.artifacts:,} artifacts"]
    return QuotaExceeded(
        f"namespace {namespace} may hold {' and '.join(allowed)}: {size:,} more bytes do not fit to its "
        f"{usage.bytes:,} in {usage.artifacts:,} artifacts, {usage.pinned_bytes:,} of them pinned",
        hint=f"unpin or remove some, or raise the quota in the store's {LIMITS_FILE}",
    )
