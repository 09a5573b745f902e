"""Job records in a real Redis: claimed, finished, given back by the dead, bounded, and never believed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from renewal import RENEWED_S, wait_for_renewal

from xkv_artifacts import jobs as module
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.errors import (
    CatalogError,
    InvalidCursor,
    InvalidKey,
    InvalidNamespace,
    JobConflict,
    TooManyJobs,
)
from xkv_artifacts.jobs import JOB_KEY, JOBS_KEY, JobBoard

ARTIFACT = "a" * 64


@pytest.fixture
def board(catalog: Catalog) -> JobBoard:
    return JobBoard(catalog.link, catalog.store_id)


def test_a_job_goes_from_queued_to_ready(board: JobBoard, catalog: Catalog) -> None:
    job = board.create("acme", ARTIFACT)
    assert (job.status, job.artifact_id, job.tries, job.error) == ("queued", ARTIFACT, 0, None)
    assert abs(job.created - catalog.now()) < 5 and job.updated == job.created
    lease = board.claim(job.id, "one")
    assert lease is not None
    with lease:
        running = board.get("acme", job.id)
        assert running is not None and (running.status, running.worker, running.tries) == (
            "running",
            "one",
            1,
        )
        assert running.updated > job.updated
        assert board.claim(job.id, "two") is None
        board.finish(job.id, "one", artifact_id="b" * 64)
    done = board.get("acme", job.id)
    assert done is not None and (done.status, done.artifact_id) == ("ready", "b" * 64)
    assert board.claim(job.id, "two") is None
    board.finish(job.id, "one", artifact_id="b" * 64)  # asked again after a lost answer
    with pytest.raises(JobConflict):
        board.finish(job.id, "one", error="no")


def test_a_failure_is_one_line(board: JobBoard) -> None:
    job = board.create("acme")
    assert board.claim(job.id, "one")
    board.finish(job.id, "one", error="first line\nsecond\x00 " + "x" * 10_000)
    failed = board.get("acme", job.id)
    assert failed is not None and failed.status == "failed" and failed.error is not None
    assert failed.error.startswith("first line second") and len(failed.error) == 500


def test_a_dead_workers_job_is_queued_again_and_given_up_in_the_end(board: JobBoard) -> None:
    job = board.create("acme")
    for number in range(module.MOST_TRIES):
        queued = board.get("acme", job.id)
        assert queued is not None and queued.status == "queued" and queued.tries == number
        assert board.claim(job.id, f"worker {number}", ttl_s=0.1) is not None
        time.sleep(0.2)
    assert board.claim(job.id, "another") is None
    failed = board.get("acme", job.id)
    assert failed is not None and failed.status == "failed" and "3 tries" in str(failed.error)


def test_a_block_that_raises_gives_the_job_back(board: JobBoard) -> None:
    job = board.create("acme")
    lease = board.claim(job.id, "one")
    assert lease is not None
    with pytest.raises(RuntimeError), lease:
        raise RuntimeError
    assert board.claim(job.id, "two") is not None
    with pytest.raises(JobConflict, match="not one's"):
        board.finish(job.id, "one", artifact_id=ARTIFACT)
    board.finish(job.id, "two", artifact_id=ARTIFACT)


def test_a_worker_that_was_slow_may_still_finish_what_nobody_took(board: JobBoard) -> None:
    job = board.create("acme")
    assert board.claim(job.id, "slow", ttl_s=0.1)
    time.sleep(0.2)
    board.finish(job.id, "slow", artifact_id=ARTIFACT)
    done = board.get("acme", job.id)
    assert done is not None and done.status == "ready"


def test_a_lease_is_renewed_while_the_work_goes_on(board: JobBoard, catalog: Catalog) -> None:
    job = board.create("acme")
    lease = board.claim(job.id, "one", ttl_s=RENEWED_S)
    assert lease is not None
    with lease:
        wait_for_renewal(lambda: catalog.link.call(lambda client: client.pttl(lease.key)))
        assert board.claim(job.id, "two") is None
        board.finish(job.id, "one", artifact_id=ARTIFACT)


def test_of_many_workers_one_gets_a_job(board: JobBoard) -> None:
    job = board.create("acme")
    got: list[str] = []

    def claim(name: str) -> None:
        if board.claim(job.id, name) is not None:
            got.append(name)

    threads = [threading.Thread(target=claim, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_namespaces_do_not_see_each_other(board: JobBoard) -> None:
    mine, theirs = board.create("acme"), board.create("other")
    assert board.get("other", mine.id) is None and board.get("acme", theirs.id) is None
    assert board.page("acme") == ([mine], None) and board.page("nobody") == ([], None)
    for name in ("", "../x", "*"):
        with pytest.raises(InvalidNamespace):
            board.page(name)
        with pytest.raises(InvalidNamespace):
            board.create(name)


def test_jobs_are_paged_newest_first(board: JobBoard) -> None:
    made = [board.create("acme") for _ in range(7)][::-1]
    seen, cursor = [], None
    for size in (3, 3, 1):
        page, cursor = board.page("acme", cursor, 3)
        assert len(page) == size
        seen += page
        board.create("acme")  # what comes later shifts nothing
    assert seen == made and cursor is None
    with pytest.raises(InvalidCursor):
        board.page("acme", "x")


def test_records_are_bounded_in_number_and_age(
    board: JobBoard, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_JOBS", 3)
    jobs = [board.create("acme") for _ in range(3)]
    with pytest.raises(TooManyJobs, match="acme has 3"):
        board.create("acme")
    board.create("other")
    assert board.claim(jobs[1].id, "one")
    board.finish(jobs[1].id, "one", error="it failed")
    assert board.create("acme").status == "queued"
    assert board.get("acme", jobs[1].id) is None and board.get("acme", jobs[0].id) is not None
    key = JOB_KEY.format(store=catalog.store_id, id=jobs[0].id)
    assert 0 < catalog.link.call(lambda client: client.ttl(key)) <= module.KEEP_S
    monkeypatch.setattr(module, "KEEP_S", 2)
    time.sleep(2.1)
    short = board.create("acme")  # those before it are too old now
    monkeypatch.setattr(module, "KEEP_S", 600)
    new = board.create("acme")
    assert [job for job in board.page("acme")[0] if job != short] == [new]
    time.sleep(2.1)
    assert board.get("acme", short.id) is None and board.page("acme") == ([new], None)


@pytest.mark.parametrize("job_id", ["", "x", "../../etc/passwd", "A" * 32, "a" * 64, "0" * 32])
def test_what_is_no_job_is_none(board: JobBoard, job_id: str) -> None:
    assert board.get("acme", job_id) is None and board.claim(job_id, "one") is None
    with pytest.raises(JobConflict):
        board.finish(job_id, "one", artifact_id=ARTIFACT)


def test_a_job_ends_with_one_thing(board: JobBoard) -> None:
    job = board.create("acme")
    assert board.claim(job.id, "one")
    for end in ({}, {"artifact_id": ARTIFACT, "error": "x"}, {"artifact_id": "../x"}):
        with pytest.raises(InvalidKey):
            board.finish(job.id, "one", **end)
    with pytest.raises(InvalidKey):
        board.create("acme", "../x")


Spoil = Callable[[Any, str], object]
HOSTILE: dict[str, Spoil] = {
    "unknown status": lambda r, key: r.hset(key, "status", "half"),
    "no status": lambda r, key: r.hdel(key, "status"),
    "namespace with a path": lambda r, key: r.hset(key, "namespace", "../x"),
    "artifact with a path": lambda r, key: r.hset(key, "artifact_id", "../x"),
    "endless error": lambda r, key: r.hset(key, "error", "x" * 100_000),
    "time that is none": lambda r, key: r.hset(key, "created", "nan"),
    "negative tries": lambda r, key: r.hset(key, "tries", "-5"),
    "not text": lambda r, key: r.hset(key, "worker", b"\xff"),
    "string for a hash": lambda r, key: (r.delete(key), r.set(key, "x")),
}


@pytest.mark.parametrize("spoil", HOSTILE)
def test_a_damaged_job_is_named_and_hides_no_other(board: JobBoard, catalog: Catalog, spoil: str) -> None:
    bad, good = board.create("acme"), board.create("acme")
    key = JOB_KEY.format(store=catalog.store_id, id=bad.id)
    catalog.link.call(lambda client: HOSTILE[spoil](client, key))
    with pytest.raises(CatalogError, match=bad.id):
        board.get("acme", bad.id)
    assert board.page("acme") == ([good], None)


def test_strange_members_are_left_out(board: JobBoard, catalog: Catalog) -> None:
    job = board.create("acme")
    key = JOBS_KEY.format(store=catalog.store_id, namespace="acme")
    catalog.link.call(lambda client: client.zadd(key, {"../x": 1, b"\xff": 2, "0" * 32: 3, "": 4}))
    assert board.page("acme") == ([job], None)
