"""A pool of Ray actors that hold the model; deaths come back as values, and Ray restarts the dead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xkv_workers.cluster import Crew
from xkv_workers.errors import RayUnavailable, WorkerFailed, XKVError, one_line
from xkv_workers.messages import Outcome, PrefixJob, WorkerConfig
from xkv_workers.plan import reason_of

MAX_RESTARTS = 100
"""Of one worker. A document that kills its worker is given up long before (schedule.MAX_STRIKES)."""

MAX_LOADS = 8
"""Failures of one worker in a row to come back and load its model, before it is left for dead."""

PLACE_SECONDS = 300
LOAD_SECONDS = 3600

IN_FLIGHT = 2
"""Batches a worker is given at once: one it computes, one it writes or that waits for its turn."""


@dataclass(frozen=True)
class Crash:
    """A batch without an answer: its worker died or raised what it should not."""

    reason: str


@dataclass
class Slot:
    """One actor, and the batches it was given.

    Args:
        loading: the call that loads its model, None once that is done or while `load_at` is awaited.
        placed: the call that a process answers as soon as there is one, None once it did.
        load_at: when to try loading again, None when there is no need.
    """

    actor: Any
    loading: Any | None
    placed: Any | None
    load_at: float | None = None
    failed_loads: int = 0
    batches: dict[Any, tuple[PrefixJob, ...]] = field(default_factory=dict)
    alone: bool = False

    @property
    def ready(self) -> bool:
        """It has its model."""
        return self.loading is None and self.load_at is None

    @property
    def free(self) -> int:
        """Batches it may be given now; none until its model is loaded."""
        return 0 if self.alone or not self.ready else IN_FLIGHT - len(self.batches)


@dataclass(frozen=True)
class Finished:
    """What became of one batch."""

    jobs: tuple[PrefixJob, ...]
    result: tuple[Outcome, ...] | Crash


class WorkerPool:
    """Workers of one run. Use within `cluster.cluster`."""

    def __init__(self, config: WorkerConfig, crew: Crew) -> None:
        import ray

        from xkv_workers.worker import PrefixWorker

        self._ray = ray
        self.crew = crew
        resources: dict[str, Any] = {"num_gpus": 1} if crew.device == "cuda" else {"num_cpus": crew.threads}
        actor = ray.remote(PrefixWorker).options(
            **resources, max_restarts=MAX_RESTARTS, max_task_retries=0, max_concurrency=IN_FLIGHT
        )
        workers = [actor.remote(config) for _ in range(crew.workers)]
        self.slots = [Slot(worker, worker.load.remote(), worker.greet.remote()) for worker in workers]

    @property
    def busy(self) -> bool:
        """Whether some worker computes."""
        return any(slot.batches for slot in self.slots)

    @property
    def ready(self) -> bool:
        """Some worker has its model."""
        return any(slot.ready for slot in self.slots)

    @property
    def running_tokens(self) -> int:
        """Tokens of the documents that workers were given."""
        return sum(job.tokens for slot in self.slots for batch in slot.batches.values() for job in batch)

    def submit(self, slot: Slot, jobs: Sequence[PrefixJob], *, alone: bool = False) -> None:
        """Give a batch to a worker; `alone`: it gets nothing else until this is done."""
        batch = tuple(jobs)
        slot.batches[slot.actor.compute.remote(batch)] = batch
        slot.alone = alone

    def wait(self, seconds: float) -> list[Finished]:
        """Batches that ended, after at most `seconds`.

        Raises:
            XKVError: a worker cannot load the model, or no worker is left.
            RayUnavailable: no worker got a place or its model in time.
        """
        self._load_again()
        watched = [call for slot in self.slots for call in (slot.loading, slot.placed) if call is not None]
        watched += [reference for slot in self.slots for reference in slot.batches]
        if not watched:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(watched, num_returns=len(watched), timeout=0)
        if not done:
            done, _ = self._ray.wait(watched, num_returns=1, timeout=seconds)
        return [ended for reference in done for ended in self._take(reference)]

    def check_patience(self, since: float) -> None:
        """Give up when nothing came of waiting for the first worker.

        Args:
            since: when anything last moved (`time.monotonic`).

        Raises:
            RayUnavailable
        """
        waited = time.monotonic() - since
        if waited > PLACE_SECONDS and all(slot.placed is not None for slot in self.slots):
            raise RayUnavailable(
                f"no worker got a place within {PLACE_SECONDS} s",
                hint="see `ray status`: is there a free CPU or GPU?",
            )
        if waited > LOAD_SECONDS:
            raise RayUnavailable(f"no worker had its model within {LOAD_SECONDS} s")

    def _load_again(self) -> None:
        for slot in self.slots:
            if slot.load_at is not None and time.monotonic() >= slot.load_at:
                slot.load_at = None
                slot.loading = slot.actor.load.remote()

    def _take(self, reference: Any) -> list[Finished]:
        for slot in list(self.slots):
            if slot.placed is reference:
                slot.placed = None
            elif slot.loading is reference:
                self._loaded(slot)
            elif reference in slot.batches:
                jobs = slot.batches.pop(reference)
                slot.alone = False
                return [Finished(jobs, self._result(slot, reference))]
        return []

    def _result(self, slot: Slot, reference: Any) -> tuple[Outcome, ...] | Crash:
        try:
            outcomes: tuple[Outcome, ...] = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            if type(cause).__name__ == "AcceleratorError":  # CUDA is lost to that process
                self._ray.kill(slot.actor, no_restart=False)
                slot.loading = slot.actor.load.remote()
            return Crash(reason_of(cause) if isinstance(cause, XKVError) else one_line(cause))
        except self._ray.exceptions.RayError as error:
            if slot.ready:
                slot.loading = slot.actor.load.remote()  # Ray starts it again
            return Crash(_died(error))
        return outcomes

    def _loaded(self, slot: Slot) -> None:
        loading, slot.loading = slot.loading, None
        try:
            self._ray.get(loading)
            slot.failed_loads = 0
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, XKVError):
                raise cause from None
            raise WorkerFailed(f"a worker cannot load the model: {one_line(cause or error)}") from None
        except self._ray.exceptions.RayError as error:
            slot.failed_loads += 1
            slot.load_at = time.monotonic() + 2**slot.failed_loads / 4
            if slot.failed_loads >= MAX_LOADS:
                self.slots.remove(slot)
            if not self.slots:
                raise WorkerFailed(
                    f"the workers do not come back: {_died(error)}",
                    hint="is there enough memory for the model?",
                ) from None


def _died(error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("ActorUnavailableError", "ActorDiedError", "WorkerCrashedError"):
        return "its worker process died (killed, out of memory, or crashed)"
    return one_line(error)
