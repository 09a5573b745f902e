"""An hour of a server's traffic in three minutes, with or without a fault; every answer is checked.

    python benchmarks/traffic.py --out benchmarks/results/traffic.json
    python benchmarks/traffic.py --fault kill-replica --out benchmarks/results/traffic_kill_replica.json

Conversations about documents (a few are asked about most), of 1 to 4 turns and many lengths; some users leave
in the middle of an answer, and some requests are bad. Afterwards each whole answer is compared with what the
model gives alone, greedily, with the cache that the server said it used: the same artifact, or an exact one.

Faults: kill-replica kills the engine's process, kill-redis the catalog's, empty-redis kills it and removes
what it saved, corrupt damages 5 % of the blobs (at least one) before the start, and slow-disk keeps them in
an object store whose answers come at 300 kB a second from a third of the time on.
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
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from report import Report
from traffic_check import check
from traffic_client import use
from traffic_faults import FAULTS, SlowLink, damage, object_store, strike

from xkv_artifacts.store import ArtifactStore

ROOT = Path(__file__).resolve().parents[1]
sys.path.extend(str(ROOT / "tests" / folder) for folder in ("e2e", "."))


def main() -> None:
    """Run the traffic, check the answers, print a table, write JSON."""
    arguments = _arguments()
    if arguments.client:
        plan, answers = arguments.plan, arguments.answers
        asyncio.run(use(arguments.client, plan, answers, arguments.seconds, arguments.rate, arguments.seed))
        return
    report = Report("traffic", " ".join(["python", *sys.argv]), "the model alone, with the same cache")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.fault == "slow-disk":
            with object_store(folder) as disk:
                report.add(**_measure(folder, "s3://traffic/store", disk, arguments))
        else:
            report.add(**_measure(folder, str(folder / "store"), None, arguments))
    report.write(arguments.out)


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(
    folder: Path, store: str, disk: SlowLink | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    from served import Server

    documents = _documents(folder, arguments)
    command = [sys.executable, "-m", "xkv_cli", "precompute", "--docs", folder / "corpus", "--ratio", "8"]
    subprocess.run([*command, "--store", store], check=True)
    if arguments.fault == "corrupt":
        print(damage(Path(store)), "blobs damaged")
    (folder / "plan.json").write_text(json.dumps(documents))
    server = Server(folder, "--store", store, "--prefix-memory", "24MiB", "--tail-memory", "128MiB")
    memory: list[int] = []
    try:
        watching = threading.Event()
        watcher = threading.Thread(target=_watch, args=(server.process.pid, memory, watching))
        watcher.start()
        fault = threading.Timer(
            arguments.seconds / 3, strike, (arguments.fault, server.process.pid, folder / "store", disk)
        )
        fault.start()
        words = ["--client", server.url, "--plan", folder / "plan.json", "--answers", folder / "answers.json"]
        options = ["--seconds", arguments.seconds, "--rate", arguments.rate, "--seed", arguments.seed]
        subprocess.run([sys.executable, __file__, *map(str, [*words, *options])], check=True)
        fault.cancel()
        watching.set()
        watcher.join()
    finally:
        server.stop()
    answers = json.loads((folder / "answers.json").read_text())
    if disk is not None:
        disk.bytes_s = None
    with ArtifactStore.open(store) as opened:
        return {"fault": arguments.fault, **_summary(answers), **_memory(memory), **check(answers, opened)}


def _documents(folder: Path, arguments: argparse.Namespace) -> list[Any]:
    from bundled import load, measure_of

    from xkv_service.demo.documents import make_document

    dice, measure = random.Random(f"traffic {arguments.seed}"), measure_of(load())
    (folder / "corpus").mkdir(parents=True)
    found = []
    for number in range(arguments.documents):
        tokens = dice.choice([600, 1200, 2400, 4800])
        document = make_document(random.Random(f"traffic {arguments.seed} {number}"), tokens, measure)
        if number < arguments.stored:
            (folder / "corpus" / f"{number}.txt").write_text(document.text)
        found.append({"text": document.text, "questions": [one.question for one in document.questions]})
    return found


def _watch(server: int, memory: list[int], ending: threading.Event) -> None:
    """Resident bytes of the engine's process, once a second."""
    while not ending.wait(1.0):
        try:
            found = [
                process.memory_info().rss
                for process in psutil.Process(server).children(recursive=True)
                if "xkv:engine" in " ".join(process.cmdline())
            ]
        except psutil.Error:
            continue
        memory.append(max(found, default=0))


def _memory(samples: list[int]) -> dict[str, float]:
    """Of the engine, MiB: medians of the second quarter of the time and of the last."""
    seen = [sample for sample in samples if sample]
    quarter = max(1, len(seen) // 4)
    early, late = seen[quarter : 2 * quarter] or seen, seen[-quarter:]
    return {"mib_early": median(early) / 2**20, "mib_late": median(late) / 2**20}


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
