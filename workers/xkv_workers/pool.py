"""A pool of Ray actors that hold the model; deaths come back as values, and Ray restarts the dead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xkv_workers.cluster import Crew
from xkv_workers.errors import WorkerFailed, XKVError
from xkv_workers.messages import Outcome, PrefixJob, WorkerConfig

MAX_RESTARTS = 100
"""Of one worker. A document that kills its worker is given up long before (schedule.MAX_STRIKES)."""

MAX_LOADS = 3
"""Deaths of one worker while it loads its model, before the run is given up."""

IN_FLIGHT = 2
"""Batches a worker is given at once: one it computes, one it writes or that waits for its turn."""


@dataclass(frozen=True)
class Crash:
    """A batch without an answer: its worker died or raised what it should not."""

    reason: str


@dataclass
class Slot:
    """One actor, and the batches it was given."""

    actor: Any
    loading: Any | None
    batches: dict[Any, tuple[PrefixJob, ...]] = field(default_factory=dict)
    alone: bool = False
    failed_loads: int = 0

    @property
    def free(self) -> int:
        """Batches it may be given now; none until its model is loaded."""
        if self.loading is not None or self.alone:
            return 0
        return IN_FLIGHT - len(self.batches)


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
        self.started = time.monotonic()
        resources: dict[str, Any] = {"num_gpus": 1} if crew.device == "cuda" else {"num_cpus": crew.threads}
        actor = ray.remote(PrefixWorker).options(
            **resources, max_restarts=MAX_RESTARTS, max_task_retries=0, max_concurrency=IN_FLIGHT
        )
        workers = [actor.remote(config) for _ in range(crew.workers)]
        self.slots = [Slot(worker, worker.load.remote()) for worker in workers]

    @property
    def busy(self) -> bool:
        return any(slot.batches for slot in self.slots)

    @property
    def ready(self) -> bool:
        """Some worker has its model."""
        return any(slot.loading is None for slot in self.slots)

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
            XKVError: a worker cannot load the model.
        """
        watched = [slot.loading for slot in self.slots if slot.loading is not None]
        watched += [reference for slot in self.slots for reference in slot.batches]
        if not watched:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(watched, num_returns=len(watched), timeout=0)
        if not done:
            done, _ = self._ray.wait(watched, num_returns=1, timeout=seconds)
        return [ended for reference in done for ended in self._take(reference)]

    def _take(self, reference: Any) -> list[Finished]:
        for slot in self.slots:
            if slot.loading is reference:
                self._loaded(slot)
            elif reference in slot.batches:
                jobs = slot.batches.pop(reference)
                slot.alone = False
                return [Finished(jobs, self._result(reference))]
        return []

    def _result(self, reference: Any) -> tuple[Outcome, ...] | Crash:
        try:
            outcomes: tuple[Outcome, ...] = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return Crash(_one_line(error.cause or error))
        except self._ray.exceptions.RayError as error:
            return Crash(_died(error))
        return outcomes

    def _loaded(self, slot: Slot) -> None:
        try:
            self._ray.get(slot.loading)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, XKVError):
                raise cause from None
            raise WorkerFailed(f"a worker cannot load the model: {_one_line(cause or error)}") from None
        except self._ray.exceptions.RayError as error:
            slot.failed_loads += 1
            if slot.failed_loads == MAX_LOADS:
                raise WorkerFailed(f"no worker starts, {MAX_LOADS} times in a row: {_died(error)}") from None
            slot.loading = slot.actor.load.remote()  # Ray starts it again
            return
        slot.loading = None


def _died(error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("ActorUnavailableError", "ActorDiedError", "WorkerCrashedError"):
        return "its worker process died (killed, out of memory, or crashed)"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
