"""`PrefixMaker`: makes prefixes one after the other on a thread, with a model that is loaded anyway."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from xkv_artifacts.errors import XKVError
from xkv_artifacts.jobs import STOPPED, VOUCH_S, Job
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.backend import NewPrefix, PrefixChanges, PrefixRecord
from xkv_service.api.errors import of_fault
from xkv_service.api.prefix_records import PrefixRecords, of_job
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import best_spec
from xkv_service.compression import compress
from xkv_service.errors import Overloaded
from xkv_service.factorization.ranks import size_of
from xkv_service.lost_device import is_lost
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.shared_weights import sharing_weights
from xkv_service.spec import DEFAULT_RATIO, CompressionSpec

MOST_WAITING = 64
_SHARE = 4
"""A namespace has one of so many places for waiting prefixes: one key cannot take them all."""
_LOOK_AGAIN_S = 0.5
_LEAST_TTL_S = 1.0
"""Of what is pinned and would have ended already."""
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Task:
    """A job with what only this process knows: the tokens, and how to compress them."""

    job: Job
    new: NewPrefix
    spec: CompressionSpec
    not_before: float  # monotonic: it may turn up by itself, or another process was making it a moment ago


class PrefixMaker:
    """Makes prefixes in the order they come, and keeps their jobs on the store's board. What waits when it is
    closed fails.

    Args:
        store: where they are kept. loaded: what they are made with. Make this before an engine runs the
            model: it takes a second model object over the same weights, so that neither waits for the other.
        calibration: the model's, or None. ratio: of prefixes that ask for none.
        most_waiting: more are refused, and more than a quarter of them of one namespace.
        on_death: called on the thread that makes prefixes where one took the device with it.

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
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._calibration, self._ratio = store, calibration, ratio
        self._loaded, self._records = sharing_weights(loaded), PrefixRecords(store)
        self._owner, self._most_waiting = f"serve-{uuid.uuid4().hex}", most_waiting
        self._on_death = on_death
        self._waiting: deque[_Task] = deque()
        self._entering: list[str] = []  # namespaces of those whose places are taken already
        self._making: _Task | None = None
        self._changed = threading.Condition()
        self._telling = threading.Lock()  # so that a job which ended is not told of again
        self._closed = threading.Event()
        work = {"make-prefixes": self._make_all, "vouch-for-prefixes": self._vouch}
        self._threads = [threading.Thread(target=work[name], name=name, daemon=True) for name in work]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Make nothing more; waits for the one that is being made."""
        with self._changed:
            self._closed.set()
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for task in left:
            self._fail(task, STOPPED)
        for thread in self._threads:
            thread.join()

    async def create(self, new: NewPrefix) -> PrefixRecord:
        """As `PrefixService`."""
        return await asyncio.to_thread(self._create, new)

    def _create(self, new: NewPrefix) -> PrefixRecord:
        spec = self._spec_of(new)
        identity, layout = self._loaded.identity, inspect_loaded(self._loaded.model).layout
        size = size_of(layout, len(new.token_ids), spec, None, self._named_by(spec))
        name = artifact_id(identity.fingerprint, new.namespace, new.token_ids, spec.canonical())
        new = self._with_promises(new, name)
        changes = PrefixChanges(new.ttl_s, new.pinned or None)
        last = self._store.jobs.last(new.namespace, name)
        if last is None or last.status != "deleted":  # else what is stored may go at any moment
            known = self._records.change([new.namespace], name, changes)
            if known is not None and known.status != "failed":
                self._end_promise(new, name)
                return known
        with self._place(new.namespace):
            self._store.check_room(new.namespace, size.bytes_tensors, name)
            job = Job(
                id=name,
                namespace=new.namespace,
                status="queued",
                model=identity.name,
                tokens=len(new.token_ids),
                name=new.name,
                pinned=new.pinned,
                ttl_s=new.ttl_s,
                created=self._store.catalog.now(),
            )
            if self._store.jobs.add(job):
                self._wait(_Task(job, new, spec, time.monotonic() + new.wait_s))
        return of_job(job)

    def _with_promises(self, new: NewPrefix, name: str) -> NewPrefix:
        """With the pin and the end of what it replaces under another id; what is there ends no sooner."""
        if new.replaces in (None, name):
            return new
        promised, now = self._store.promised(str(new.replaces))
        there = self._records.get([new.namespace], name)
        if there is not None and there.status != "failed":
            its = there.expires if there.ttl_s is None else now + there.ttl_s
            ends = None if promised.expires is None or its is None else max(promised.expires, its)
        else:
            ends = promised.expires
        ttl_s = None if ends is None else max(_LEAST_TTL_S, ends - now)
        return replace(new, pinned=new.pinned or promised.pinned, ttl_s=ttl_s)

    def _end_promise(self, new: NewPrefix, name: str) -> None:
        """What was promised of the artifact that this one replaces holds for this one now."""
        if new.replaces not in (None, name):
            self._store.end_promise(str(new.replaces))

    @contextmanager
    def _place(self, namespace: str) -> Iterator[None]:
        """Keep a place among those that wait while a job is put on the board."""
        with self._changed:
            taken = [*(task.new.namespace for task in self._waiting), *self._entering]
            if self._closed.is_set() or len(taken) >= self._most_waiting:
                raise Overloaded(f"{len(taken)} prefixes wait to be made")
            if (own := taken.count(namespace)) >= max(1, self._most_waiting // _SHARE):
                raise Overloaded(f"{own} prefixes of namespace {namespace} wait to be made")
            self._entering.append(namespace)
        try:
            yield
        finally:
            with self._changed:
                self._entering.remove(namespace)

    def _wait(self, task: _Task) -> None:
        """Put a task behind all others."""
        with self._changed:
            if self._making is task:
                self._making = None
            if not (closed := self._closed.is_set()):
                self._waiting.append(task)
                self._changed.notify_all()
        if closed:
            self._fail(task, STOPPED)

    def _spec_of(self, new: NewPrefix) -> CompressionSpec:
        """The spec that was asked for, or of the ratio; over bases that the store still has."""
        own, spec = self._calibration, new.spec
        if spec is None or spec.calibration not in (None, own and own.id):
            ratio = new.ratio or (spec and spec.ratio) or self._ratio
            spec = CompressionSpec(ratio=ratio) if own is None else best_spec(ratio, own)
        shared = spec.calibration if spec.basis == "calibrated" else None
        if shared is not None and not self._store.calibrations.blobs.exists(shared):
            spec = spec.over("document")
        return spec

    def _named_by(self, spec: CompressionSpec) -> Calibration | None:
        """The calibration, if the spec names one: what was made without any is made again without."""
        return self._calibration if spec.calibration else None

    def _make_all(self) -> None:
        while (task := self._next()) is not None:
            try:
                self._tell(task)
                self._make(task)
            except XKVError as error:
                self._fail(task, of_fault(error).message)  # clients read it
            except Exception:  # noqa: BLE001 - whatever it was: logged, told, and the next one is made
                _log.exception("prefix %s failed", task.job.id[:12])
                self._fail(task, "internal error")
                if is_lost(self._loaded.model.device):
                    self._on_death()

    def _next(self) -> _Task | None:
        with self._changed:
            self._making = None
            while (task := self._first_due()) is None:
                if self._closed.is_set():
                    return None
                self._changed.wait(_LOOK_AGAIN_S if self._waiting else None)
            self._making = task
            self._waiting.remove(task)
            task.job = task.job.model_copy(update={"status": "running"})
            return task

    def _vouch(self) -> None:
        while not self._closed.wait(VOUCH_S / 3):
            for task in self._unfinished():
                try:
                    if not self._tell(task):
                        self._give_up(task)
                except XKVError as error:
                    _log.warning("nobody can see how prefixes are getting on: %s", error.message)
                    break

    def _unfinished(self) -> list[_Task]:
        with self._changed:
            return [*filter(None, [self._making]), *self._waiting]

    def _tell(self, task: _Task) -> bool:
        """Vouch for a task; False: its record is gone for so long that it may have been deleted."""
        with self._telling:
            return task not in self._unfinished() or self._store.jobs.tell(task.job)

    def _give_up(self, task: _Task) -> None:
        """Let a task not wait any more; one that is being made will not be published."""
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)
                _log.warning("prefix %s is not made: it may have been deleted long ago", task.job.id[:12])

    def _fail(self, task: _Task, error: str) -> None:
        try:
            with self._telling:
                self._making = None
                self._store.jobs.fail(task.job, error)
        except XKVError as unsaid:  # nobody vouches for it any more: it will be seen as failed
            _log.warning("prefix %s failed: %s; and %s", task.job.id[:12], error, unsaid.message)

    def _first_due(self) -> _Task | None:
        now = time.monotonic()
        return next((task for task in self._waiting if task.not_before <= now), None)

    def _make(self, task: _Task) -> None:
        """Compress and publish, unless another process does (then look again later: others wait as well), or
        nobody wants it any more."""
        lease = self._store.catalog.lease(task.job.id, self._owner)
        if lease is None:
            task.not_before = time.monotonic() + _LOOK_AGAIN_S
            self._wait(task)
            return
        with lease:
            stored = self._wanted(task) is None or self._store.get(task.job.id) is not None
            self._finish(task, None if stored else self._publish(task))

    def _wanted(self, task: _Task) -> Job | None:
        """The job as it was changed since, None where it was deleted or may have been; a record that was lost
        is told again.
        """
        if not self._tell(task):
            return None
        job = self._store.jobs.last(task.job.namespace, task.job.id) or task.job
        return None if job.status == "deleted" else job

    def _publish(self, task: _Task) -> Job | None:
        """Compress, and publish what is wanted then; the job as it was then, None: it was not wanted."""
        spec = task.spec
        factors = compress(self._loaded.model, list(task.new.token_ids), spec, self._named_by(spec))
        manifest = PrefixManifest(
            id=task.job.id,
            model=self._loaded.identity,
            namespace=task.new.namespace,
            document=DocumentRef(uri=task.new.name, sha256=task.new.sha256),
            created=datetime.now(timezone.utc),
            **factors.manifest_fields(),
        )
        job = self._wanted(task)
        if job is not None:
            self._store.jobs.publishing(job, manifest.created.timestamp())
            self._store.publish(manifest, factors.to_tensors(), pinned=job.pinned, ttl_s=job.ttl_s)
            self._end_promise(task.new, job.id)
        return job

    def _finish(self, task: _Task, published: Job | None) -> None:
        """End the job. What was asked of it while it was published is done now."""
        with self._telling:
            self._making = None
            job = self._store.jobs.finish(task.job.namespace, task.job.id) or task.job
        if job.status == "deleted":
            if published is not None:
                self._store.remove(job.id)
            self._store.jobs.finish(job.namespace, job.id, deleted=True)
            return
        pinned, ttl_s = (published.pinned, published.ttl_s) if published else (False, None)
        changes = PrefixChanges(
            ttl_s=None if job.ttl_s == ttl_s else job.ttl_s or 0,
            pinned=None if job.pinned == pinned else job.pinned,
        )
        if changes != PrefixChanges():
            self._records.change([job.namespace], job.id, changes)
