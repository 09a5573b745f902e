"""Kill precompute at random points and see that nothing is lost.

Each trial starts `xkv precompute` on a new store and kills the driver or a worker with SIGKILL at a random
point: at some moment of the start-up, or a moment after some number of artifacts was published. Then the run
(driver killed: the next run) must end well, every artifact published before the kill must be there, byte for
byte, `xkv verify` must pass, and after `xkv gc --orphans` no temporary file may be left.

    python tools/crash_test.py --points 20 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from report import Report, command

XKV = [sys.executable, "-m", "xkv_cli"]
RUN_SECONDS = 600
STARTING = 0.2
"""Share of the kills that fall into the start-up."""


@dataclass(frozen=True)
class Trial:
    """What one kill did.

    Args:
        victim: "driver" or "worker". at: seconds into the run.
        published: artifacts in the store at the kill.
        computed, reused: by the run that finished the work.
        swept: temporary files that `gc --orphans` deleted.
        fault: what went wrong, "" when nothing did.
    """

    victim: str
    at: float
    published: int
    computed: int
    reused: int
    swept: int
    fault: str


@dataclass(frozen=True)
class Point:
    """When to kill whom: `delay` seconds after the start, or after `published` artifacts are in the store."""

    victim: str
    published: int
    delay: float


class TrialFailed(Exception):
    """Something that must hold did not."""


def main() -> int:
    """Run the trials and print the table; 0 when all of them held."""
    options = _options()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        corpus = options.docs or _write_corpus(root / "corpus", options.documents)
        common = ["--docs", str(corpus), "--ratio", str(options.ratio), "--workers", "1", "--json"]
        common += ["--model", str(options.model)] if options.model else []
        documents = sum(path.is_file() for path in corpus.rglob("*"))
        report = Report("crash_test", command(), "every kill must hold: no fault")
        for number in range(options.points):
            point = _draw_point(draw, "worker" if number % 2 else "driver", documents)
            report.add(**asdict(_trial(common, root / f"store{number}", point, documents)))
    if options.json:
        report.write(options.json)
    failed = sum(bool(row["fault"]) for row in report.rows)
    print(f"{options.points - failed} of {options.points} held")
    return 1 if failed else 0


def _draw_point(draw: random.Random, victim: str, documents: int) -> Point:
    if draw.random() < STARTING:
        return Point(victim, 0, draw.uniform(0, 10))
    return Point(victim, draw.randrange(1, documents), draw.uniform(0, 0.3))


def _trial(common: list[str], store: Path, point: Point, documents: int) -> Trial:
    run = _start(common, store)
    published: dict[str, str] = {}
    at = 0.0
    computed = reused = swept = 0
    try:
        at = _kill(run, point, store)
        published = _blobs(store)
        report = _json(_wait(run if point.victim == "worker" else _start(common, store)))
        computed, reused = int(str(report["computed"])), int(str(report["reused"]))
        swept = _check(store, published, documents)
        fault = ""
    except TrialFailed as failure:
        fault = str(failure)
    return Trial(point.victim, round(at, 2), len(published), computed, reused, swept, fault)


def _kill(run: subprocess.Popen[bytes], point: Point, store: Path) -> float:
    """SIGKILL the victim at the point, or as soon as there is one; returns seconds since the start."""
    started = time.monotonic()
    while run.poll() is None and sum(1 for _ in store.glob("prefixes/*/*")) < point.published:
        time.sleep(0.002)
    reached = time.monotonic()
    while run.poll() is None and time.monotonic() - reached < point.delay:
        time.sleep(0.002)
    while run.poll() is None:
        target = psutil.Process(run.pid) if point.victim == "driver" else _worker(run.pid)
        if target is not None:
            target.kill()
            break
        time.sleep(0.01)
    if point.victim == "driver":
        run.communicate()
    return time.monotonic() - started


def _worker(driver: int) -> psutil.Process | None:
    try:
        for process in psutil.Process(driver).children(recursive=True):
            if any("PrefixWorker" in word for word in process.cmdline()):
                return process
    except psutil.Error:
        pass
    return None


def _check(store: Path, published: dict[str, str], documents: int) -> int:
    """What must hold at the end; returns how many temporary files were swept."""
    now = _blobs(store)
    lost = [name for name in published if name not in now]
    changed = [name for name, digest in published.items() if now.get(name) not in (None, digest)]
    if lost or changed:
        raise TrialFailed(f"lost {len(lost)}, changed {len(changed)} published artifacts")
    if len(now) != documents:
        raise TrialFailed(f"{len(now)} artifacts instead of {documents}")
    swept = _json(_command("gc", "--orphans", "--store", str(store), "--json"))
    left = [path.name for path in (store / "tmp").glob("*")]
    if left:
        raise TrialFailed(f"temporary files stayed: {left[:3]}")
    verified = _json(_command("verify", "--store", str(store), "--json"))
    listed = _json(_command("ls", "--store", str(store), "--json"))
    if verified["failed"] or verified["artifacts"] != documents:
        raise TrialFailed(f"verify: {verified}")
    if len(listed["artifacts"]) != documents:
        raise TrialFailed(f"the catalog lists {len(listed['artifacts'])}")
    return int(str(swept["files"]))


def _blobs(store: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.glob("prefixes/*/*")}


def _start(common: list[str], store: Path) -> subprocess.Popen[bytes]:
    return _command("precompute", *common, "--store", str(store))


def _command(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "XKV_REDIS_URL"}
    return subprocess.Popen(
        [*XKV, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def _wait(run: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    try:
        out, err = run.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
        raise TrialFailed(f"hung for {RUN_SECONDS} s") from None
    return run.returncode, out, err


def _json(done: tuple[int, bytes, bytes] | subprocess.Popen[bytes]) -> dict[str, object]:
    code, out, err = done if isinstance(done, tuple) else _wait(done)
    if code != 0 or b"Traceback" in err:
        raise TrialFailed(f"exit {code}: {err.decode(errors='replace').strip()[-300:]}")
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def _write_corpus(folder: Path, documents: int) -> Path:
    """Documents of 600 to 1,500 characters, no two alike."""
    folder.mkdir()
    for number in range(documents):
        lines = [f"The code of room {number}-{line} is {(number * 7919 + line * 104729) % 100000:05d}."
                 for line in range(20 + number % 30)]  # fmt: skip
        (folder / f"{number:03d}.txt").write_text("\n".join(lines))
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=40, help="documents in the corpus that is made")
    parser.add_argument("--docs", type=Path, help="another corpus")
    parser.add_argument("--model", type=Path, help="another model than the bundled one")
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="write the trials there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
