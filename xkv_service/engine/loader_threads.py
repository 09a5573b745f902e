"""Threads that run loads, with spare ones for those that hang."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Job:
    """A load in the queue, running, or done."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.running = self.stuck = False


class LoaderThreads:
    """Runs jobs in order on so many threads. A job that is found stuck does not count any more: another
    thread takes its place, up to `most` in all. Nothing waits for the threads when the process ends.

    Args:
        threads: jobs at a time. most: threads, stuck ones included.
    """

    def __init__(self, threads: int, most: int) -> None:
        self.wanted, self._most = threads, most
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live = self._stuck = self._made = 0
        for _ in range(threads):
            self._start()

    def submit(self, run: Callable[[], None]) -> Job:
        """Run `run` when a thread is free."""
        job = Job(run)
        self._jobs.put(job)
        return job

    def give_up(self, job: Job) -> None:
        """Count a running job as stuck; another thread works in its place until it returns."""
        with self._lock:
            if not job.running or job.stuck:
                return
            job.stuck = True
            self._stuck += 1
            spare = self._live < min(self._most, self.wanted + self._stuck)
        if spare:
            self._start()

    def close(self) -> None:
        """Let idle threads end; those that run a job end after it."""
        with self._lock:
            live = self._live
        for _ in range(live):
            self._jobs.put(None)

    def _start(self) -> None:
        with self._lock:
            self._live += 1
            self._made += 1
            name = f"prefix-loader-{self._made}"
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.running = True
            try:
                job.run()
            except Exception:  # noqa: BLE001 - the thread is needed for other loads
                _log.exception("a load failed in an unexpected way")
            if self._is_surplus(job):
                return
        with self._lock:
            self._live -= 1

    def _is_surplus(self, job: Job) -> bool:
        """Note that a job is done; whether its thread is one too many now."""
        with self._lock:
            job.running = False
            self._stuck -= job.stuck
            surplus = self._live > self.wanted + self._stuck
            self._live -= surplus
            return surplus
