"""Collecting in a store of 100,000 artifacts: seconds and round trips to Redis.

    python benchmarks/store_collection.py

The catalog is filled as `catalog_lookup.py` does, over 100 namespaces; each artifact has a blob of 64 bytes
and every tenth a retention file, so what is timed is the bookkeeping: finding what has to go, looking at its
retention file, dropping its entry, deleting its files on this machine's disk. Redis answers over TCP on
127.0.0.1. The baseline is reading all entries once, in pages of 500, as `xkv ls` does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catalog_lookup import entry, start_redis
from report import Report

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.entry import Entry
from xkv_artifacts.keys import token_bytes
from xkv_artifacts.limits import Limits, Quota
from xkv_artifacts.namespace_index import INDEXED_KEY, NAMESPACE_KEY, SUMS_KEY
from xkv_artifacts.redis_link import RedisLink
from xkv_artifacts.retention import FOLDER, SUFFIX, Retention
from xkv_artifacts.store import ArtifactStore

NAMESPACES = 100
BLOB = bytes(64)
RESULT = Path(__file__).parent / "results" / "store_collection.json"


class CountedLink(RedisLink):
    """Counts round trips: each call is one, a pipeline too, but for scans, which are counted as they page."""

    trips = 0

    def call(self, command: Callable[..., Any], *, patience_s: float | None = None) -> Any:
        self.trips += 1
        return super().call(command, patience_s=patience_s)


def made(number: int, ends: float | None) -> Entry:
    identity = f"{number:08x}" * 8
    plain = entry(identity, f"n{number % NAMESPACES}", 8)
    return plain.model_copy(update={"bytes": len(BLOB), "last_used": float(number), "expires": ends})


def write(root: Path, name: str, content: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def fill(store: ArtifactStore, root: Path, count: int) -> None:
    """Entries, blobs and, for every tenth, a retention file: ended for one half, in an hour for the other."""
    now = store.catalog.now()
    for number in range(count):
        ends = None if number % 10 else now + (3600 if number % 20 else -1)
        item = made(number, ends)
        write(root, blob_name(item.id), BLOB)
        if ends is not None:
            text = Retention(expires=ends).model_dump_json()
            write(root, blob_name(item.id, FOLDER, SUFFIX), text.encode())
        store.catalog.publish(item, token_bytes(range(number, number + 8)))


def forget_namespaces(store: ArtifactStore) -> None:
    """As a catalog of an earlier version."""
    names = [NAMESPACE_KEY.format(store=store.catalog.store_id, namespace=f"n{n}") for n in range(NAMESPACES)]
    names += [key.format(store=store.catalog.store_id) for key in (INDEXED_KEY, SUMS_KEY)]
    store.catalog.link.call(lambda client: client.delete(*names))


def all_pages(store: ArtifactStore, namespace: str) -> int:
    count, cursor = 0, None
    while True:
        page, cursor = store.page(namespace, cursor, 500)
        count += len(page)
        if cursor is None:
            return count


def run(options: argparse.Namespace, server: int, url: str, root: Path) -> None:
    report = Report(
        "store_collection",
        f"python benchmarks/store_collection.py{' --realtime' if options.realtime else ''}",
        "reading all entries once",
    )
    count = options.artifacts
    size = len(BLOB)
    with ArtifactStore.open(str(root), url) as opened:
        link = CountedLink(url)
        opened.catalog.link.close()
        store = ArtifactStore(opened.blobs, type(opened.catalog)(link, opened.catalog.store_id))
        fill(store, root, count)
        if options.realtime:
            for process in (0, server):
                os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(10))
        baseline = 0.0

        def measure(what: str, work: Callable[[], int]) -> None:
            nonlocal baseline
            link.trips, begin = 0, time.perf_counter()
            artifacts = work()
            seconds = time.perf_counter() - begin
            baseline = baseline or seconds
            report.add(
                what=what,
                artifacts=artifacts,
                seconds=seconds,
                round_trips=link.trips,
                ms_per_artifact=1000 * seconds / max(1, artifacts),
                ratio=seconds / baseline,
            )

        def removed(limits: Limits, dry_run: bool = False) -> int:
            return len(store.collect(limits, dry_run=dry_run).removed)

        measure("read all entries", lambda: len(store.entries()))
        measure("read one namespace of 100, in pages of 500", lambda: all_pages(store, "n1"))
        forget_namespaces(store)
        measure(
            "index the namespaces of an older catalog", lambda: store.catalog.namespaces.ensure() or count
        )
        measure("count everything again", lambda: store.catalog.namespaces.recount_all() or count)
        measure("delete what has ended", lambda: removed(Limits()))
        left = count - count // 20
        measure("nothing to do, with a budget and quotas", lambda: removed(everything_fits(count)))
        tenth = Limits(budget=size * (left - count // 10))
        measure("a tenth is over the budget, dry run", lambda: removed(tenth, dry_run=True))
        measure("a tenth is over the budget", lambda: removed(tenth))
        quota = Limits(namespaces={"n1": Quota(artifacts=count // NAMESPACES // 2)})
        measure("half of one namespace is over its quota", lambda: removed(quota))
        extra = {"store_artifacts": count, "realtime": options.realtime}
        report.write(options.out, **extra, load_average=os.getloadavg())


def everything_fits(count: int) -> Limits:
    return Limits(budget=count * len(BLOB), each=Quota(bytes=count * len(BLOB), artifacts=count))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of collecting in a large store.")
    parser.add_argument("--artifacts", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--realtime", action="store_true", help="measure at real-time priority (needs root)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, url = start_redis(folder)
        try:
            run(options, server.pid, url, Path(folder) / "store")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
