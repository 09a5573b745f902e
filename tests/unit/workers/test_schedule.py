"""What the scheduler does about artifacts that are stored already, without workers or a store."""

from __future__ import annotations

from array import array
from contextlib import AbstractContextManager

import pytest

from xkv_artifacts.manifest import DocumentRef
from xkv_workers.low_fidelity import Standard
from xkv_workers.messages import PrefixJob, Stored
from xkv_workers.observer import Silent
from xkv_workers.pool import WorkerPool
from xkv_workers.report import Ledger
from xkv_workers.schedule import Scheduler
from xkv_workers.shelf import Shelf

FULL = Stored("a" * 64, tokens=3, bytes_full=300, bytes_stored=100, fidelity=0.93, kl=0.02)


class FullShelf(Shelf):
    """Has one artifact, and no store behind it."""

    def __init__(self) -> None:
        """Without the store that a shelf is of."""

    def find(self, job: PrefixJob) -> Stored | None:
        return FULL if job.artifact_id == FULL.artifact_id else None

    def keep(self, stored: Stored) -> bool:
        return True


class NoWorkers:
    """Nothing may be computed."""

    def turn(self) -> AbstractContextManager[bool]:
        raise AssertionError("workers were asked for")

    def start(self) -> WorkerPool:
        raise AssertionError("workers were started")


@pytest.mark.parametrize(("min_fidelity", "reused"), [(0.0, 2), (0.93, 2), (0.99, 0)])
def test_what_is_stored_is_reused_from_the_fidelity_asked_for(min_fidelity: float, reused: int) -> None:
    ledger = Ledger()
    scheduler = Scheduler(FullShelf(), NoWorkers(), ledger, Silent(), Standard(min_fidelity=min_fidelity))
    documents = [DocumentRef(uri=uri, sha256="d" * 64) for uri in ("a.txt", "copy.txt")]
    scheduler.run(PrefixJob(FULL.artifact_id, array("i", [1, 2, 3]), document) for document in documents)
    report = ledger.report(0.0)
    assert (report.computed, report.reused, report.failed) == (0, reused, 2 - reused)
    for error in report.errors:
        assert error.reason == (
            "stored already with fidelity 0.930, below 0.99: "
            "lower --min-fidelity, or compress with a lower --ratio"
        )
