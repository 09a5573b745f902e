"""How long a second replica takes to come under load and to go afterwards, and what becomes of the requests.

    python benchmarks/autoscaling.py --out benchmarks/results/autoscaling.json

A server has one or two replicas, and eight requests for each. Twelve users ask about one pinned document,
again and again. Once the second replica has answered for 10 s they leave, and three streams go on until one
replica is left. What Ray Serve did, and when, is read from its logs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from report import Report, command

ROOT = Path(__file__).resolve().parents[1]
sys.path.extend(str(ROOT / folder) for folder in ("tests/e2e", "tests", "."))

from asking import Asker, example_document, wait_until  # noqa: E402
from scaling import Crowd, Logs, long_streams, questions, watching  # noqa: E402
from served import Server, use_factors  # noqa: E402

NAME = "bulletin-houston-lucky-dove-society"
USERS, TARGET, STREAMS = 12, 8, 3
WITH_TWO_S = 10.0


def main() -> None:
    """Measure once, print a row, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/autoscaling.json"))
    parser.add_argument("--upscale-delay", default="5s")
    parser.add_argument("--downscale-delay", default="5s")
    parser.add_argument("--stream-tokens", type=int, default=2500)
    arguments = parser.parse_args()
    report = Report("autoscaling", command(), "none")
    with tempfile.TemporaryDirectory() as name:
        report.add(**_measure(Path(name), arguments))
    report.write(arguments.out)


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    delays = ("--upscale-delay", arguments.upscale_delay, "--downscale-delay", arguments.downscale_delay)
    batch = ("--replicas", "1-2", "--max-running", "1", "--target-requests", TARGET)
    server = Server(folder, "--store", folder / "store", *batch, *delays)
    try:
        asker, logs, (document, items) = Asker(server.url), Logs(server), example_document(NAME)
        _store(server, document)
        with watching(server) as watch:
            answers: list[tuple[float, float]] = []  # when, and after how many seconds
            loaded = time.time()
            with Crowd(USERS, _timed(questions(asker, document, items), answers)) as crowd:
                wait_until(lambda: watch.now == 2)
                newcomer = logs.replicas()[-1]
                wait_until(lambda: logs.answered(newcomer) is not None)
                time.sleep(WITH_TWO_S)
            unloaded = time.time()
            with Crowd(STREAMS, long_streams(asker, arguments.stream_tokens)) as streams:
                wait_until(lambda: logs.decided("Downscaling") is not None)
            wait_until(lambda: logs.stopped(newcomer) is not None and watch.now == 1)
        up, ready = _known(logs.decided("Upscaling")), _known(logs.started(newcomer))
        down, gone = _known(logs.decided("Downscaling")), _known(logs.stopped(newcomer))
        return {
            "upscale_delay": arguments.upscale_delay,
            "downscale_delay": arguments.downscale_delay,
            "up_decided_s": up - loaded,
            "up_started_s": ready - up,
            "down_decided_s": down - unloaded,
            "down_answers_s": _known(logs.answered(newcomer)) - down,
            "down_ended_s": gone - _known(logs.answered(newcomer)),
            "shown_s": watch.engines[-1][0] - gone,
            "answers": dict(Counter(crowd.ends)),
            "answer_s_with_one": median(taken for when, taken in answers if when < ready),
            "answer_s_with_two": median(taken for when, taken in answers if when > unloaded - WITH_TWO_S),
            "streams": dict(Counter(streams.ends)),
            "not_ready": len(watch.not_ready),
            "counters_that_fell": sorted(set(watch.fallen)),
        }
    finally:
        server.stop()


def _store(server: Server, document: str) -> None:
    body = {"document": document, "ratio": 20, "pin": True}
    made = httpx.post(f"{server.url}/v1/prefixes", json=body, timeout=60).json()["id"]
    wait_until(lambda: httpx.get(f"{server.url}/v1/prefixes/{made}", timeout=60).json()["status"] == "ready")
    use_factors(f"{server.url}/v1", document)


def _timed(turn: Callable[[int], str], answers: list[tuple[float, float]]) -> Callable[[int], str]:
    def ask(user: int) -> str:
        began = time.time()
        end = turn(user)
        answers.append((time.time(), time.time() - began))
        return re.sub(r"\(.*", "", end)  # of an error its name

    return ask


def _known(when: float | None) -> float:
    assert when is not None
    return when


if __name__ == "__main__":
    main()
