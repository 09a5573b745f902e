"""Which document is computed when, by whom, and how often: the loop of the driver process."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from xkv_workers.corpus import Rejected
from xkv_workers.low_fidelity import Standard
from xkv_workers.messages import Failed, PrefixJob, Stored
from xkv_workers.observer import Observer, Progress
from xkv_workers.pool import Crash, Finished, WorkerPool
from xkv_workers.report import Ledger
from xkv_workers.shelf import Shelf

MAX_STRIKES = 3
"""Tries of a document whose worker died or asked for another try. After the first it is computed alone."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Most tokens, padding included, that are prefilled at once; a longer document goes alone."""

PENDING_TOKENS = 50_000_000
"""Tokens held ready (200 MB); reading the corpus waits when there are more."""

LOOK_SECONDS = 0.5
LOOK_MANY = 16
_TURN_SECONDS = 0.2

Item = PrefixJob | Rejected | Exception | None


class Starter(Protocol):
    """Starts the workers of a run."""

    def turn(self) -> AbstractContextManager[bool]:
        """Whether they may be started now, while the block runs."""

    def start(self) -> WorkerPool:
        """Start them."""


class Scheduler:
    """Runs a plan to its end. Documents that another process computes are waited for, not computed.

    Args:
        standard: a document whose stored artifact falls short of it fails, and is not computed again.
    """

    def __init__(
        self,
        shelf: Shelf,
        starter: Starter,
        ledger: Ledger,
        observer: Observer,
        standard: Standard,
    ) -> None:
        self._shelf, self._starter, self._ledger, self._observer = shelf, starter, ledger, observer
        self._standard = standard
        self._inbox: queue.Queue[Item] = queue.Queue(maxsize=256)
        self._reading = True
        self._pending: list[PrefixJob] = []
        self._elsewhere: dict[str, PrefixJob] = {}
        self._strikes: Counter[str] = Counter()
        self._pool: WorkerPool | None = None
        self._first_ready = self._looked = 0.0
        self._moved = time.monotonic()

    def run(self, plan: Iterable[PrefixJob | Rejected]) -> None:
        """Settle every document of the plan in the ledger.

        Raises:
            XKVError: Ray, the model or Redis cannot be had; what is settled stays settled.
        """
        reader = threading.Thread(target=self._read, args=(plan,), name="xkv-plan", daemon=True)
        reader.start()
        while self._reading or self._pending or self._elsewhere or (self._pool and self._pool.busy):
            self._receive()
            self._look_elsewhere()
            self._dispatch()
            for finished in self._wait():
                self._settle(finished)
            self._tell()

    def _read(self, plan: Iterable[PrefixJob | Rejected]) -> None:
        try:
            for item in plan:
                self._inbox.put(item)
            self._inbox.put(None)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that runs the pipeline
            self._inbox.put(error)

    def _receive(self) -> None:
        """Take what the reading thread has ready, longest document first from then on."""
        held = sum(job.tokens for job in self._pending)
        until = time.monotonic() + _TURN_SECONDS
        while self._reading and held < PENDING_TOKENS and time.monotonic() < until:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, Exception):
                raise item
            if item is None:
                self._reading = False
            elif isinstance(item, Rejected):
                self._ledger.reject(item.uri, item.reason)
            elif self._ledger.plan(item.artifact_id, item.document) and not self._take_stored(item):
                self._pending.append(item)
                held += item.tokens
        self._pending.sort(key=lambda job: (self._strikes[job.artifact_id], -job.tokens))

    def _take_stored(self, job: PrefixJob) -> bool:
        """Settle a document whose artifact is in the store; False when there is none."""
        stored = self._shelf.find(job)
        if stored is None:
            return False
        if reason := self._standard.shortfall(stored):
            self._ledger.fail(job.artifact_id, reason)
        elif not self._shelf.keep(stored):
            return False
        else:
            self._ledger.store(stored, computed=False)
        self._moved = time.monotonic()
        return True

    def _look_elsewhere(self) -> None:
        """Artifacts other processes work on: stored by now, or theirs no more."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        waiting = dict(self._elsewhere)
        if not self._can_work():  # others may do our work while we wait for a place
            waiting.update((job.artifact_id, job) for job in self._pending[:LOOK_MANY])
        for artifact_id, job in waiting.items():
            if self._take_stored(job):
                self._elsewhere.pop(artifact_id, None)
                self._pending = [other for other in self._pending if other is not job]
            elif artifact_id in self._elsewhere and not self._shelf.is_leased(artifact_id):
                self._pending.append(self._elsewhere.pop(artifact_id))

    def _can_work(self) -> bool:
        return self._pool is not None and self._pool.ready

    def _dispatch(self) -> None:
        if self._pending and self._pool is None:
            self._start()
        if self._pool is None:
            return
        if not self._pool.ready:
            self._pool.check_patience(self._moved)
            return
        self._first_ready = self._first_ready or time.monotonic()
        for slot in sorted(self._pool.slots, key=lambda slot: len(slot.batches)):
            while slot.free and self._pending:
                batch, alone = self._next_batch(idle=not slot.batches)
                if not batch:
                    break
                self._pool.submit(slot, batch, alone=alone)

    def _start(self) -> None:
        """Start the workers when it is our turn, unless others did the work while we waited for it."""
        with self._starter.turn() as ours:
            if not ours:
                return
            self._pending = [job for job in self._pending if not self._take_stored(job)]
            if self._pending:
                self._pool = self._starter.start()
                self._moved = time.monotonic()

    def _next_batch(self, *, idle: bool) -> tuple[list[PrefixJob], bool]:
        """The longest documents that fit one batch; one that failed before goes alone to an idle worker."""
        assert self._pool is not None
        budget = BATCH_TOKENS[self._pool.crew.device]
        batch: list[PrefixJob] = []
        for job in list(self._pending):
            suspect = self._strikes[job.artifact_id] > 0
            if suspect and (batch or not idle):
                continue
            if batch and batch[0].tokens * (len(batch) + 1) > budget:
                break
            self._pending.remove(job)
            if self._lease(job):
                batch.append(job)
                if suspect:
                    return batch, True
        return batch, False

    def _lease(self, job: PrefixJob) -> bool:
        """Whether this process may compute it: nobody else does, and nobody did since it was planned."""
        if not self._shelf.lease(job.artifact_id):
            self._elsewhere[job.artifact_id] = job
            return False
        if self._take_stored(job):
            self._shelf.release(job.artifact_id)
            return False
        return True

    def _wait(self) -> list[Finished]:
        if self._pool is not None:
            return self._pool.wait(_TURN_SECONDS)
        if self._reading or self._elsewhere or self._pending:
            time.sleep(_TURN_SECONDS / 10 if self._reading else _TURN_SECONDS)
        return []

    def _settle(self, finished: Finished) -> None:
        self._moved = time.monotonic()
        result = finished.result
        if isinstance(result, Crash):
            result = tuple(Failed(job.artifact_id, result.reason, again=True) for job in finished.jobs)
        jobs = {job.artifact_id: job for job in finished.jobs}
        for outcome in result:
            if isinstance(outcome, Stored):
                self._ledger.store(outcome, computed=True)
            else:
                self._fail(jobs[outcome.artifact_id], outcome)
            self._shelf.release(outcome.artifact_id)

    def _fail(self, job: PrefixJob, failed: Failed) -> None:
        self._strikes[job.artifact_id] += 1
        if failed.again and self._strikes[job.artifact_id] < MAX_STRIKES:
            self._observer.note(f"{job.document.uri} is tried again: {failed.reason}")
            self._pending.append(job)
        else:
            tries = self._strikes[job.artifact_id]
            self._ledger.fail(job.artifact_id, failed.reason + (f" ({tries} tries)" if tries > 1 else ""))

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed by this run, per second since the first worker was ready; 0 before."""
        seconds = self._moved - self._first_ready
        return self._ledger.computed_tokens / seconds if self._first_ready and seconds > 0 else 0.0

    def _tell(self) -> None:
        running = self._pool.running_tokens if self._pool else 0
        self._observer.progress(
            Progress(
                documents=self._ledger.total,
                settled=self._ledger.settled,
                reading=self._reading,
                ready=self._can_work(),
                tokens=self._ledger.computed_tokens,
                tokens_left=running + sum(job.tokens for job in self._pending),
                tokens_per_second=self.tokens_per_second,
                ratio=self._ledger.ratio,
            )
        )
