"""Ray actors that calibrate: each observes one document at a time, one of them decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xkv_workers.cluster import Crew
from xkv_workers.errors import RayUnavailable, WorkerFailed, XKVError, one_line
from xkv_workers.messages import ModelPlace
from xkv_workers.pool import MAX_RESTARTS, PLACE_SECONDS

if TYPE_CHECKING:
    import torch

    from xkv_artifacts.calibration_format import CalibrationManifest
    from xkv_service.calibration.probes import ProbedPrefix
    from xkv_service.calibration.settings import CalibrationSettings

    Tensors = dict[str, torch.Tensor]

_MORE_TRIES = 2
"""Of a document whose worker died; Ray starts the worker again and repeats the call."""


class CalibrationCrew:
    """Workers of one calibration. Use within `cluster.cluster`.

    Raises:
        RayUnavailable: none of them got a place in time.
    """

    def __init__(self, place: ModelPlace, crew: Crew, settings: CalibrationSettings) -> None:
        import ray

        from xkv_workers.calibration_worker import CalibrationWorker

        self._ray, self._settings = ray, settings
        resources: dict[str, Any] = {"num_gpus": 1} if crew.device == "cuda" else {"num_cpus": crew.threads}
        actor = ray.remote(CalibrationWorker).options(
            **resources, max_restarts=MAX_RESTARTS, max_task_retries=_MORE_TRIES
        )
        self._workers = [actor.remote(place) for _ in range(crew.workers)]
        greeted, _ = ray.wait([worker.greet.remote() for worker in self._workers], timeout=PLACE_SECONDS)
        if not greeted:
            raise RayUnavailable(
                f"no worker got a place within {PLACE_SECONDS} s",
                hint="see `ray status`: is there a free CPU or GPU?",
            )
        for worker in self._workers:
            worker.prepare.remote()

    def observe(self, documents: Mapping[int, ProbedPrefix]) -> Iterator[tuple[int, Tensors | str]]:
        """What each document adds to the sums, or why it adds nothing, by its position; in any order.

        Raises:
            XKVError: a worker cannot load the model.
        """
        idle, waiting = list(self._workers), deque(documents.items())
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while idle and waiting:
                worker, (position, document) = idle.pop(), waiting.popleft()
                running[worker.observe.remote(document, self._settings)] = (position, worker)
            done, _ = self._ray.wait(list(running))
            for reference in done:
                position, worker = running.pop(reference)
                idle.append(worker)
                yield position, self._result(reference)

    def decide(
        self,
        parts: Sequence[Tensors],
        used: Sequence[ProbedPrefix],
        held: Sequence[ProbedPrefix],
        threads: int,
        earlier: str | None,
    ) -> CalibrationManifest:
        """The published calibration, made by one worker with so many threads; the others leave.

        Args:
            parts: sums over parts of the documents. earlier: id of a calibration whose sums are added.

        Raises:
            XKVError: it cannot be made.
        """
        decider, *others = self._workers
        for worker in others:
            self._ray.kill(worker)
        made = self._result(decider.decide.remote(parts, used, held, self._settings, threads, earlier))
        if isinstance(made, str):
            raise WorkerFailed(f"no calibration was made: {made}", hint="is there enough memory?")
        manifest: CalibrationManifest = made
        return manifest

    def _result(self, reference: Any) -> Any:
        """What a call returned, or in one line why it failed."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, XKVError):
                raise error.cause from None
            return one_line(error.cause or error)
        except self._ray.exceptions.RayError as error:
            return f"its worker process died ({type(error).__name__})"
