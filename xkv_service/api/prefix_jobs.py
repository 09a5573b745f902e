"""`PrefixJobs`: prefixes that wait to be made, made one after the other by a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from xkv_artifacts.errors import XKVError
from xkv_service.api.backend import NewPrefix, PrefixStatus
from xkv_service.errors import Overloaded
from xkv_service.spec import CompressionSpec

_log = logging.getLogger(__name__)
_MOST_FAILED = 1000


@dataclass
class PrefixJob:
    """One prefix to make.

    Args:
        id: its artifact's. new: what was asked for. spec: how to compress it.

    Attributes:
        unwanted: set when it is not to be made (any more).
    """

    id: str
    new: NewPrefix
    spec: CompressionSpec
    status: PrefixStatus = "queued"
    error: str | None = None
    created: float = field(default_factory=time.time)
    unwanted: threading.Event = field(default_factory=threading.Event)


class PrefixJobs:
    """Makes prefixes in the order they come. Every method may be called from any thread.

    Args:
        make: makes one, on the thread; raises what went wrong. most_waiting: more are refused.
    """

    def __init__(self, make: Callable[[PrefixJob], None], most_waiting: int) -> None:
        self._make, self._most_waiting = make, most_waiting
        self._jobs: OrderedDict[str, PrefixJob] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._live, name="prefix-jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Make nothing more; waits for the one that is being made."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.unwanted.set()
            self._changed.notify_all()
        self._thread.join()

    def add(self, job: PrefixJob) -> PrefixJob:
        """Have a prefix made; the job that makes it already, if there is one.

        Raises:
            Overloaded: too many wait.
        """
        with self._changed:
            known = self._jobs.get(job.id)
            if known is not None and known.status != "failed":
                return known
            waiting = sum(other.status == "queued" for other in self._jobs.values())
            if self._closed or waiting >= self._most_waiting:
                raise Overloaded(f"{waiting} prefixes wait to be made")
            self._jobs.pop(job.id, None)
            self._jobs[job.id] = job
            self._changed.notify_all()
            return job

    def get(self, prefix_id: str) -> PrefixJob | None:
        """The job of a prefix that is not there yet, or failed."""
        with self._changed:
            return self._jobs.get(prefix_id)

    def of(self, namespace: str) -> list[PrefixJob]:
        """A namespace's jobs, newest first."""
        with self._changed:
            return [job for job in reversed(self._jobs.values()) if job.new.namespace == namespace]

    def remove(self, job: PrefixJob) -> None:
        """Do not make it, or forget that it failed."""
        with self._changed:
            job.unwanted.set()
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]

    def _live(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._make(job)
            except XKVError as error:
                self._fail(job, error.message)
            except Exception:  # noqa: BLE001 - whatever it was: logged, told, and the next one is made
                _log.exception("prefix %s failed", job.id[:12])
                self._fail(job, "internal error")
            else:
                self.remove(job)

    def _next(self) -> PrefixJob | None:
        with self._changed:
            while True:
                if self._closed:
                    return None
                job = next((job for job in self._jobs.values() if job.status == "queued"), None)
                if job is not None:
                    job.status = "running"
                    return job
                self._changed.wait()

    def _fail(self, job: PrefixJob, message: str) -> None:
        with self._changed:
            job.status, job.error = "failed", message
            failed = [other for other in self._jobs.values() if other.status == "failed"]
            for old in failed[: len(failed) - _MOST_FAILED]:
                del self._jobs[old.id]
