"""`LocalPrefixes`: makes prefixes in this process, on a model that is loaded anyway, for a store."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone

from xkv_artifacts.entry import Entry
from xkv_artifacts.errors import ArtifactNotFound
from xkv_artifacts.keys import artifact_id, is_artifact_id
from xkv_artifacts.manifest import DocumentRef, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixPage, PrefixRecord
from xkv_service.api.prefix_jobs import PrefixJob, PrefixJobs
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec
from xkv_service.compression import compress
from xkv_service.factorization.ranks import size_of
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.shared_weights import sharing_weights
from xkv_service.spec import DEFAULT_RATIO, CompressionSpec

MOST_WAITING = 64
_LOOK_AGAIN_S = 0.5


class LocalPrefixes:
    """A `PrefixService` of one process. Prefixes that wait when it ends are not made.

    Args:
        store: where they are kept. loaded: what they are made with. Make this before an engine runs the
            model: it takes a second model object over the same weights, so that neither waits for the other.
        calibration: the model's, or None. ratio: of prefixes that ask for none.

    Raises:
        CacheMisuse: the model is in use already.
    """

    def __init__(
        self,
        store: ArtifactStore,
        loaded: LoadedModel,
        *,
        calibration: Calibration | None = None,
        ratio: float = DEFAULT_RATIO,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._store, self._calibration, self._ratio = store, calibration, ratio
        self._loaded = sharing_weights(loaded)
        self._owner = f"serve-{uuid.uuid4().hex}"
        self._jobs = PrefixJobs(self._make, most_waiting)

    def close(self) -> None:
        """Make nothing more; waits for the one that is being made."""
        self._jobs.close()

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._create, new)

    async def page(self, namespace: str, cursor: str | None, limit: int) -> PrefixPage:
        """As `PrefixService`. The first page has those being made beside its `limit` others."""
        return await asyncio.to_thread(self._page, namespace, cursor, limit)

    async def get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._get, namespaces, prefix_id)

    async def change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._change, namespaces, prefix_id, changes)

    async def delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._delete, namespaces, prefix_id)

    def _create(self, new: NewPrefix) -> PrefixRecord:
        spec = self._spec(self._ratio if new.ratio is None else new.ratio)
        size_of(inspect_loaded(self._loaded.model).layout, len(new.token_ids), spec, None, self._calibration)
        fingerprint = self._loaded.identity.fingerprint
        name = artifact_id(fingerprint, new.namespace, new.token_ids, spec.canonical())
        changes = PrefixChanges(new.ttl_s, new.pinned or None)
        if (known := self._change([new.namespace], name, changes)) and known.status != "failed":
            return known
        return self._of_job(self._jobs.add(PrefixJob(name, new, spec)))

    def _spec(self, ratio: float) -> CompressionSpec:
        if self._calibration is None:
            return CompressionSpec(ratio=ratio)
        return best_spec(ratio, self._calibration)

    def _page(self, namespace: str, cursor: str | None, limit: int) -> PrefixPage:
        jobs = self._jobs.of(namespace) if cursor is None else []
        entries, following = self._store.page(namespace, cursor, limit)
        made = {job.id for job in jobs}
        records = [_of_entry(entry) for entry in entries if entry.id not in made]
        return PrefixPage([*map(self._of_job, jobs), *records], following)

    def _get(self, namespaces: Sequence[str], prefix_id: str) -> PrefixRecord | None:
        if (job := self._job(namespaces, prefix_id)) is not None:
            return self._of_job(job)
        entry = self._entry(namespaces, prefix_id)
        return None if entry is None else _of_entry(entry)

    def _change(
        self, namespaces: Sequence[str], prefix_id: str, changes: PrefixChanges
    ) -> PrefixRecord | None:
        if (job := self._job(namespaces, prefix_id)) is not None:
            if changes.ttl_s is not None:
                job.new = replace(job.new, ttl_s=changes.ttl_s or None)
            if changes.pinned is not None:
                job.new = replace(job.new, pinned=changes.pinned)
            return self._of_job(job)
        if self._entry(namespaces, prefix_id) is None:
            return None
        try:
            if changes.ttl_s is not None:
                self._store.set_ttl(prefix_id, changes.ttl_s or None)
            if changes.pinned is not None:
                (self._store.pin if changes.pinned else self._store.unpin)(prefix_id)
        except ArtifactNotFound:  # collected in between
            return None
        return self._get(namespaces, prefix_id)

    def _delete(self, namespaces: Sequence[str], prefix_id: str) -> bool:
        job = self._job(namespaces, prefix_id)
        if job is not None:
            self._jobs.remove(job)
        stored = self._entry(namespaces, prefix_id) is not None and self._store.remove(prefix_id)
        return stored or job is not None

    def _job(self, namespaces: Sequence[str], prefix_id: str) -> PrefixJob | None:
        job = self._jobs.get(prefix_id)
        return job if job is not None and job.new.namespace in namespaces else None

    def _entry(self, namespaces: Sequence[str], prefix_id: str) -> Entry | None:
        """The entry of a stored prefix in these namespaces; nothing more is read of another one."""
        if not is_artifact_id(prefix_id):
            return None
        if not self._store.catalog.namespaces.holds(namespaces, prefix_id):
            return None
        entry = self._store.get(prefix_id)
        return entry if entry is not None and entry.namespace in namespaces else None

    def _make(self, job: PrefixJob) -> None:
        """Compress and publish, unless another process does."""
        while not job.unwanted.is_set():
            lease = self._store.catalog.lease(job.id, self._owner)
            if lease is not None:
                with lease:
                    self._make_alone(job)
                return
            job.unwanted.wait(_LOOK_AGAIN_S)

    def _make_alone(self, job: PrefixJob) -> None:
        new = job.new
        if self._store.get(job.id) is not None:
            return
        ids = list(new.token_ids)
        factors = compress(self._loaded.model, ids, job.spec, self._calibration)
        manifest = PrefixManifest(
            id=job.id,
            model=self._loaded.identity,
            namespace=new.namespace,
            document=DocumentRef(uri=new.name, sha256=new.sha256),
            created=datetime.now(timezone.utc),
            **factors.manifest_fields(),
        )
        if not job.unwanted.is_set():
            new = job.new  # it may have been changed meanwhile
            self._store.publish(manifest, factors.to_tensors(), pinned=new.pinned, ttl_s=new.ttl_s)

    def _of_job(self, job: PrefixJob) -> PrefixRecord:
        new = job.new
        return PrefixRecord(
            id=job.id,
            namespace=new.namespace,
            status=job.status,
            model=self._loaded.identity.name,
            tokens=len(new.token_ids),
            name=new.name,
            created=job.created,
            expires=None if new.ttl_s is None else time.time() + new.ttl_s,
            pinned=new.pinned,
            error=job.error,
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
        bytes=entry.bytes,
        ratio=entry.ratio,
        fidelity=entry.fidelity,
        expires=entry.expires,
        pinned=entry.pinned,
    )
