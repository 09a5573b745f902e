"""Parts of a file read on several threads, the next ones while one is used."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

AHEAD = 4
"""Parts that are read while one is used, so that reading goes on while a model computes first tokens; no
other number was measured."""
Result = TypeVar("Result")
Job = Callable[[], Result]


class Landing(Protocol):
    """Where the tensors of a blob go to.

    Attributes:
        threads: that read and check at a time. `buffer` and `placed` are called on them.
        together: whether no part is handed over before all are read.
    """

    threads: int
    together: bool

    def place(self, name: str) -> str:
        """Where a tensor goes to. Neighbours in the file that go to the same place share a buffer."""

    def buffer(self, place: str, nbytes: int) -> torch.Tensor:
        """Memory to read tensors into: uint8 [nbytes] on the CPU."""

    def placed(self, place: str, buffer: torch.Tensor) -> torch.Tensor:
        """The memory that is handed over in place of a buffer whose tensors were read and checked."""


def read_ahead(
    parts: Iterable[Sequence[Job[Result]]], threads: int, *, together: bool = False
) -> Generator[list[Result], None, None]:
    """The results of each part's jobs, in order. While a part is used, the jobs of the next `AHEAD` run.

    Closing it waits for jobs that have begun. An error of a job is raised in its part's place.

    Args:
        together: run all jobs before the first part is used.
    """
    crew: _Crew[Result] = _Crew(threads)
    begun: deque[list[Future[Result]]] = deque()
    try:
        for part in parts:
            begun.append([crew.submit(job) for job in part])
            if len(begun) > AHEAD and not together:
                yield [future.result() for future in begun.popleft()]
        if together:
            wait([future for part in begun for future in part], return_when=FIRST_EXCEPTION)
        while begun:
            yield [future.result() for future in begun.popleft()]
    finally:
        crew.close()


class _Crew(Generic[Result]):
    """Threads that do jobs in order. They do not keep a process from ending, as those of a pool would."""

    def __init__(self, threads: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Result], Job[Result]] | None] = queue.SimpleQueue()
        self._closed = False
        self._most = threads
        self._threads: list[threading.Thread] = []

    def submit(self, job: Job[Result]) -> Future[Result]:
        """Have a job done. The first ones start a thread each: what is read first waits for one alone."""
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        if len(self._threads) < self._most:
            name = f"blob-reader-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        return future

    def close(self) -> None:
        """Leave out what has not begun, and wait for what has."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if self._closed:
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            del item, future, job  # or the last result stays in memory
