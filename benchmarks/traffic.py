"""An hour of a server's traffic in three minutes, with or without a fault; every answer is checked.

    python benchmarks/traffic.py --out benchmarks/results/traffic.json
    python benchmarks/traffic.py --fault kill-replica --out benchmarks/results/traffic_kill_replica.json

Conversations about documents (a few are asked about most), of 1 to 4 turns and many lengths; some users leave
in the middle of an answer, and some requests are bad. Afterwards each whole answer is compared with what the
model gives alone, greedily, with the cache that the server said it used: the same artifact, or an exact one.

Faults, each after a third of the time: kill-replica kills the engine's process in the middle of a request,
kill-redis the catalog's, empty-redis kills it and removes what it saved, and slow-disk keeps the blobs in an
object store whose answers come at 300 kB a second from then on. The embedded Redis is back within a second or
two; redis-away has the catalog in a Redis of the benchmark's own (--redis), kills that, and starts it again
20 s later with its data. redis-hangs stops that for as long instead, while ten clients ask for the list of
prefixes; redis-emptied kills it and starts it at once with nothing in it. corrupt damages 5 % of the blobs
(at least one), those of the documents asked about most; missing removes their files. What is in memory stays
right and needs no Redis, so give these five many documents and little memory: then these leave, and are asked
for again.

    python benchmarks/traffic.py --fault corrupt --seconds 90 --rate 0.5 --documents 40 --stored 40 \\
        --longest 1200 --prefix-memory 8MiB --tail-memory 4MiB --out benchmarks/results/traffic_corrupt.json
    python benchmarks/traffic.py --fault redis-away --seconds 75 --rate 0.6 --documents 30 --stored 30 \\
        --longest 1200 --prefix-memory 8MiB --tail-memory 4MiB \\
        --out benchmarks/results/traffic_redis_away.json
    python benchmarks/traffic.py --fault redis-hangs --seconds 75 --rate 0.6 --documents 30 --stored 30 \\
        --longest 1200 --prefix-memory 8MiB --tail-memory 4MiB \\
        --out benchmarks/results/traffic_redis_hangs.json
    python benchmarks/traffic.py --fault redis-emptied --seconds 120 --rate 0.6 --documents 30 --stored 30 \\
        --longest 1200 --prefix-memory 8MiB --tail-memory 4MiB \\
        --out benchmarks/results/traffic_redis_emptied.json

What a fault did, and what was seen of it, is in the file as "struck"; one that did not happen is an error.

More than a server can do, with a limit on how long requests wait to be begun:

    python benchmarks/traffic.py --seconds 60 --rate 6 --prefix-memory 6MiB --tail-memory 8MiB \\
        --queue-timeout 20s --unchecked --out benchmarks/results/traffic_overload.json

Memory of the server's processes is sampled every 5 s. Whether it stays flat shows once all budgets are full;
"budgets" says when that was, and "memory" the medians of the thirds of the time from then on:

    python benchmarks/traffic.py --seconds 2400 --rate 0.4 --longest 1200 --prefix-memory 6MiB \\
        --tail-memory 8MiB --stored-tails 16MiB --unchecked --out benchmarks/results/traffic_memory.json

With twice the requests for less time, and every answer checked:

    python benchmarks/traffic.py --seconds 600 --rate 0.8 --longest 1200 --prefix-memory 6MiB \\
        --tail-memory 8MiB --stored-tails 16MiB --out benchmarks/results/traffic_flat.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from report import Report, command, table
from traffic_budgets import BUDGETS, BudgetWatch, filled
from traffic_check import check
from traffic_client import use
from traffic_damage import Damage, counted, met
from traffic_faults import FAULTS, OWN_REDIS, SlowLink, Strike, object_store
from traffic_memory import MemoryWatch, Samples, by_minute, early_and_late, growth
from traffic_redis import OwnRedis

from xkv_artifacts.store import ArtifactStore

_LENGTHS = (600, 1200, 2400, 4800)
ROOT = Path(__file__).resolve().parents[1]
sys.path.extend(str(ROOT / folder) for folder in ("tests/e2e", "tests", "."))


def main() -> None:
    """Run the traffic, check the answers, print a table, write JSON."""
    arguments = _arguments()
    if arguments.client:
        plan, answers = arguments.plan, arguments.answers
        asyncio.run(use(arguments.client, plan, answers, arguments.seconds, arguments.rate, arguments.seed))
        return
    report = Report("traffic", command(), "the model alone, with the same cache")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, disk, redis = Path(name), None, None
        if arguments.fault == "slow-disk":
            disk = stack.enter_context(object_store(folder))
        if arguments.fault in OWN_REDIS:
            redis = OwnRedis(folder / "redis")
            stack.callback(redis.kill)
        row, held, budgets, struck = _measure(folder, disk, redis, arguments)
    report.add(**row)
    full_s = max((one["full_s"] for one in budgets if one["full_s"] is not None), default=0.0)
    grown = growth(held, full_s)
    for rows in (budgets, grown):
        print("\n" + table(rows))
    report.write(arguments.out, struck=struck, budgets=budgets, memory=grown, unique_mib=by_minute(held))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/traffic.json"))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--rate", type=float, default=1.0, help="conversations a second")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--stored", type=int, default=20, help="of them, have an artifact")
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--longest", type=int, default=4800, help="document, in tokens")
    parser.add_argument("--prefix-memory", default="24MiB", help="of the server, as its options below")
    parser.add_argument("--tail-memory", default="128MiB")
    parser.add_argument("--stored-tails", default="4GiB")
    parser.add_argument("--queue-timeout", default="5m")
    parser.add_argument("--unchecked", action="store_true", help="do not compare the answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(
    folder: Path, disk: SlowLink | None, redis: OwnRedis | None, arguments: argparse.Namespace
) -> tuple[dict[str, Any], Samples, list[dict[str, Any]], dict[str, Any]]:
    from served import Server

    documents = _documents(folder, arguments)
    store = str(folder / "store") if disk is None else "s3://traffic/store"
    place = ["--store", store, *([] if redis is None else ["--redis", redis.url])]
    command = [sys.executable, "-m", "xkv_cli", "precompute", "--docs", folder / "corpus", "--ratio", "8"]
    subprocess.run([*command, *place], check=True)
    (folder / "plan.json").write_text(json.dumps(documents))
    budgets = {name: getattr(arguments, name) for name in BUDGETS}
    sizes = [text for name, size in budgets.items() for text in (f"--{name.replace('_', '-')}", size)]
    damage, counts = Damage(folder / "store"), dict[str, float]()
    server = Server(folder, *place, *sizes, "--queue-timeout", arguments.queue_timeout)
    try:
        memory, budget_watch = MemoryWatch(server.process.pid), BudgetWatch(server.url)
        strike = Strike(
            arguments.fault,
            server=server.process.pid,
            url=server.url,
            store=folder / "store",
            log=server.log,
            disk=disk,
            redis=redis,
            damage=damage,
        )
        fault = threading.Timer(arguments.seconds / 3, strike.now)
        fault.start()
        words = ["--client", server.url, "--plan", folder / "plan.json", "--answers", folder / "answers.json"]
        options = ["--seconds", arguments.seconds, "--rate", arguments.rate, "--seed", arguments.seed]
        try:
            subprocess.run([sys.executable, __file__, *map(str, [*words, *options])], check=True)
        finally:
            fault.cancel()
            fault.join()
        held, full = memory.end(), filled(budget_watch.end(), budgets)
        struck = strike.proof()
        if damage.ids:
            counts = {**damage.mended(), **counted(server.url)}
    finally:
        server.stop()
    answers = json.loads((folder / "answers.json").read_text())
    if disk is not None:
        disk.bytes_s = None
    if redis is not None:
        struck |= redis.seen_by(answers)
    with ArtifactStore.open(store, redis and redis.url) as opened:
        checked = {} if arguments.unchecked else check(answers, opened)
    if damage.ids:
        checked |= {**met(answers), **counts}
    row = {"fault": arguments.fault, **_summary(answers), **early_and_late(held["engine"]), **checked}
    return row, held, full, struck


def _documents(folder: Path, arguments: argparse.Namespace) -> list[Any]:
    from bundled import load, measure_of

    from xkv_service.demo.documents import make_document

    dice, measure = random.Random(f"traffic {arguments.seed}"), measure_of(load())
    (folder / "corpus").mkdir(parents=True)
    found = []
    for number in range(arguments.documents):
        tokens = dice.choice([length for length in _LENGTHS if length <= arguments.longest])
        document = make_document(random.Random(f"traffic {arguments.seed} {number}"), tokens, measure)
        if number < arguments.stored:
            (folder / "corpus" / f"{number}.txt").write_text(document.text)
        found.append({"text": document.text, "questions": [one.question for one in document.questions]})
    return found


def _summary(answers: list[Any]) -> dict[str, Any]:
    kinds = Counter(answer["end"] for answer in answers)
    whole = [answer for answer in answers if answer["end"] == "answered"]
    reasons = Counter(answer["xkv"]["miss"]["reason"] for answer in whole if answer["xkv"]["miss"])
    return {
        "requests": len(answers),
        **dict(kinds),
        "from_artifacts": sum(answer["xkv"]["artifact"] is not None for answer in whole),
        "cached": sum(answer["cached"] for answer in whole) / max(1, sum(one["prompt"] for one in whole)),
        "first_token_s": median(answer["first_token_s"] for answer in whole),
        "longest_s": max(answer["seconds"] for answer in answers),
        "misses": dict(reasons),
    }


if __name__ == "__main__":
    main()
