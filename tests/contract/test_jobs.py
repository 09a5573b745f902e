"""Job records in a real Redis: vouched for, ended, restored, bounded, and never believed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from xkv_artifacts import jobs as module
from xkv_artifacts.catalog import Catalog
from xkv_artifacts.errors import CatalogUnavailable, InvalidNamespace
from xkv_artifacts.jobs import JOB_KEY, JOBS_KEY, PUBLISHING_KEY, STOPPED, Job, JobBoard, Publication
from xkv_artifacts.redis_link import RedisLink

STARTED = round(time.time())


@pytest.fixture
def board(catalog: Catalog) -> JobBoard:
    return JobBoard(catalog.link, catalog.store_id)


def job(number: int = 0, namespace: str = "acme", **fields: Any) -> Job:
    told = {
        "status": "queued",
        "model": "tiny",
        "tokens": 100,
        "name": "lisbon.txt",
        "created": STARTED + number / 4,
        **fields,
    }
    return Job(id=f"{number:064x}", namespace=namespace, **told)


def running(one: Job) -> Job:
    return one.model_copy(update={"status": "running"})


def test_a_job_is_queued_then_running_then_gone(board: JobBoard) -> None:
    one = job(pinned=True, ttl_s=60.5)
    assert board.get("acme", one.id) is None and board.add(one)
    assert board.get("acme", one.id) == one and board.all("acme") == [one]
    board.tell(running(one))
    assert board.get("acme", one.id) == running(one)
    assert board.finish("acme", one.id) == running(one)
    assert (
        board.get("acme", one.id) is None and board.all("acme") == [] and board.finish("acme", one.id) is None
    )


def test_a_failure_is_one_line_and_gives_way_to_another_try(board: JobBoard) -> None:
    assert board.add(job())
    board.fail(job(), "first line\nsecond\t" + "x" * 10_000)
    failed = board.get("acme", job().id)
    assert failed is not None and failed.status == "failed"
    assert failed.error.startswith("first line second") and len(failed.error) == 500
    assert board.add(job())
    assert board.get("acme", job().id) == job()


def test_the_same_job_is_added_once(board: JobBoard) -> None:
    added: list[bool] = []
    threads = [threading.Thread(target=lambda: added.append(board.add(job()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == [False] * 7 + [True]
    board.tell(running(job()))
    assert not board.add(job())
    assert board.add(job(namespace="other"))


def test_a_job_whose_maker_went_away_has_failed(board: JobBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VOUCH_S", 1.0)
    assert board.add(job())
    assert board.add(job(1))
    board.tell(running(job(1)))
    time.sleep(1.1)
    for number in (0, 1):
        found = board.get("acme", job(number).id)
        assert found is not None and (found.status, found.error) == ("failed", STOPPED)
    assert [one.status for one in board.all("acme")] == ["failed", "failed"]
    board.tell(running(job(1)))  # it was only slow
    assert board.get("acme", job(1).id) == running(job(1))
    assert board.add(job()) and not board.add(job(1))


def test_what_is_changed_is_kept_until_its_maker_sees_it(board: JobBoard) -> None:
    board.add(job(ttl_s=5.0))
    assert board.change("acme", job().id, pinned=True)
    assert board.change("acme", job().id, ttl_s=0)
    assert not board.change("other", job().id, pinned=False) and not board.change("acme", job().id)
    board.tell(running(job(ttl_s=5.0)))
    done = board.finish("acme", job().id)
    assert done is not None and done.pinned and done.ttl_s is None


def test_a_deleted_job_is_seen_by_its_maker_alone(board: JobBoard) -> None:
    board.add(job())
    assert not board.remove("other", job().id) and board.remove("acme", job().id)
    assert not board.remove("acme", job().id) and not board.change("acme", job().id, pinned=True)
    board.tell(running(job()))
    board.fail(job(), "it failed")
    assert board.get("acme", job().id) is None and board.all("acme") == []
    last = board.last("acme", job().id)
    assert last is not None and last.status == "deleted"
    assert board.add(job())  # wanted again
    assert board.finish("acme", job().id) is None  # the first maker is done: this is not its job
    assert board.get("acme", job().id) == job()


def test_what_is_published_is_told_until_its_job_is_finished(board: JobBoard, catalog: Catalog) -> None:
    one, other = job(), job(1, "other")
    for number, each in enumerate((one, other)):
        board.add(each)
        board.tell(running(each))
        board.publishing(each, 1.5e9 + number / 3)
    both = [Publication("acme", one.id, 1.5e9), Publication("other", other.id, 1.5e9 + 1 / 3)]
    assert sorted(board.publications(), key=lambda found: found.id) == both
    board.finish("other", other.id)
    assert board.publications() == both[:1]
    board.remove("acme", one.id)
    for _ in range(2):  # its maker has yet to remove what it published
        deleted = board.finish("acme", one.id)
        assert deleted is not None and deleted.status == "deleted" and board.publications() == both[:1]
    assert board.finish("acme", one.id, deleted=True) == deleted
    assert board.publications() == [] and board.last("acme", one.id) is None

    key = PUBLISHING_KEY.format(store=catalog.store_id)
    junk = {"x": "acme 1.0", one.id: "acme", job(1).id: "../x 1.0", job(2).id: "acme soon", b"\xff": b"\xff"}
    catalog.link.call(lambda client: client.hset(key, mapping=junk))
    assert board.publications() == []


def test_a_redis_that_lost_its_records_has_them_again(board: JobBoard, catalog: Catalog) -> None:
    board.add(job(pinned=True))
    catalog.link.call(lambda client: client.flushdb())
    assert board.get("acme", job().id) is None
    board.tell(running(job(pinned=True)))
    assert board.get("acme", job().id) == running(job(pinned=True))
    assert board.all("acme") == [running(job(pinned=True))]


def test_namespaces_do_not_see_each_other(board: JobBoard) -> None:
    mine, theirs = job(), job(1, "other")
    assert board.add(mine) and board.add(theirs)
    assert board.get("other", mine.id) is None and board.get("acme", theirs.id) is None
    assert board.all("acme") == [mine] and board.all("nobody") == []
    for name in ("", "../x", "*"):
        for ask in (
            board.all,
            lambda name: board.get(name, mine.id),
            lambda name: board.remove(name, mine.id),
        ):
            with pytest.raises(InvalidNamespace):
                ask(name)


def test_records_are_bounded_in_number_and_age(
    board: JobBoard, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_JOBS", 3)
    for number in range(5):
        board.add(job(number))
    board.add(job(0, "other"))
    assert [one.id for one in board.all("acme")] == [job(number).id for number in (4, 3, 2)]
    assert board.get("acme", job(1).id) is None
    key = JOB_KEY.format(store=catalog.store_id, namespace="acme", id=job(4).id)
    assert 0 < catalog.link.call(lambda client: client.ttl(key)) <= module.KEEP_S
    monkeypatch.setattr(module, "KEEP_S", 1)
    board.add(job(5))
    time.sleep(1.2)
    assert board.get("acme", job(5).id) is None and board.all("acme") == []


def test_a_deletion_is_remembered_as_long_as_somebody_may_still_make_it(
    board: JobBoard, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_S", 2)
    board.add(job())
    board.remove("acme", job().id)
    for _ in range(5):  # its maker has yet to come to it
        time.sleep(0.6)
        assert board.tell(running(job()))
    last = board.last("acme", job().id)
    assert last is not None and last.status == "deleted"

    long_ago = job(created=time.time() - 5)
    time.sleep(2.2)  # nobody vouches
    assert board.last("acme", job().id) is None
    assert not board.tell(running(long_ago)) and board.last("acme", job().id) is None
    assert board.tell(running(job(created=time.time()))), "this one cannot have been deleted long ago"


@pytest.mark.parametrize("deleted", ["before", "after"])
def test_that_what_is_published_was_deleted_is_remembered_until_it_is_seen(
    board: JobBoard, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, deleted: str
) -> None:
    monkeypatch.setattr(module, "KEEP_S", 1)
    board.add(job())
    steps = [lambda: board.publishing(job(), 1.0), lambda: board.remove("acme", job().id)]
    for step in steps if deleted == "after" else steps[::-1]:
        step()
    board.tell(running(job()))
    time.sleep(1.5)
    last = board.last("acme", job().id)
    assert last is not None and last.status == "deleted"
    assert board.add(job())  # wanted again: it ends as any other
    time.sleep(1.5)
    assert board.last("acme", job().id) is None


@pytest.mark.parametrize("job_id", ["", "x", "../../etc/passwd", "A" * 64, "a" * 32, "0" * 64])
def test_what_is_no_job_is_none(board: JobBoard, job_id: str) -> None:
    assert board.get("acme", job_id) is None
    assert not board.change("acme", job_id, pinned=True) and not board.remove("acme", job_id)


Spoil = Callable[[Any, str], object]
HOSTILE: dict[str, Spoil] = {
    "unknown status": lambda r, key: r.hset(key, "status", "half"),
    "no status": lambda r, key: r.hdel(key, "status"),
    "endless error": lambda r, key: r.hset(key, "error", "x" * 100_000),
    "time that is none": lambda r, key: r.hset(key, "created", "nan"),
    "negative tokens": lambda r, key: r.hset(key, "tokens", "-5"),
    "not text": lambda r, key: r.hset(key, "name", b"\xff"),
    "nobody vouches": lambda r, key: r.hdel(key, "vouched"),
    "vouched for with junk": lambda r, key: r.hset(key, "vouched", "soon"),
    "string for a hash": lambda r, key: (r.delete(key), r.set(key, "x")),
}


@pytest.mark.parametrize("spoil", HOSTILE)
def test_a_damaged_job_counts_as_none_and_hides_no_other(
    board: JobBoard, catalog: Catalog, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.add(job(1))
    with monkeypatch.context() as patch:
        patch.setattr(module, "VOUCH_S", 0.1)
        board.add(job(0))
    key = JOB_KEY.format(store=catalog.store_id, namespace="acme", id=job(0).id)
    catalog.link.call(lambda client: HOSTILE[spoil](client, key))
    assert board.get("acme", job(0).id) is None
    assert board.all("acme") == [job(1)]
    board.change("acme", job(0).id, pinned=True)
    board.remove("acme", job(0).id)
    time.sleep(0.1)
    assert board.add(job(0))
    assert board.get("acme", job(0).id) == job(0)
    catalog.link.call(lambda client: HOSTILE[spoil](client, key))
    assert board.finish("acme", job(0).id) is None


def test_strange_members_are_left_out(board: JobBoard, catalog: Catalog) -> None:
    board.add(job(1))
    key = JOBS_KEY.format(store=catalog.store_id, namespace="acme")
    catalog.link.call(lambda client: client.zadd(key, {"../x": 1, b"\xff": 2, "0" * 64: 3, "": 4}))
    assert board.all("acme") == [job(1)]


def test_no_redis_is_said_in_one_line(tmp_path: Any) -> None:
    board = JobBoard(RedisLink(f"unix://{tmp_path}/none.sock", patience_s=0), "0")
    for ask in (lambda: board.add(job()), lambda: board.get("acme", job().id), lambda: board.all("acme")):
        with pytest.raises(CatalogUnavailable, match="does not answer"):
            ask()
