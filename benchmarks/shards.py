"""Run `xkv eval` in several processes at once, each on a share of the documents, and merge what they find.

    python benchmarks/shards.py --processes 14 --out whole.json -- --samples 520 --methods xkv:ratio=8

What stands behind `--` goes to `xkv eval`. Of a process that fails, the end of its output is printed and its
share is left out: what is written is then said to be a part, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from xkv_service.evaluation.results import from_json, merge


def main() -> int:
    """Run, wait, merge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("options", nargs="+", help="of xkv eval, behind --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{number}.json" for number in range(arguments.processes)]
        running = [_start(part, number, arguments) for number, part in enumerate(parts, 1)]
        failed = [part for part, process in zip(parts, running, strict=True) if process.wait()]
        for part in failed:
            said = part.with_suffix(".log").read_text("utf-8")[-600:]
            print(f"{part.name} failed:\n{said}", file=sys.stderr)
        # A failed process may have left the documents it got to, whose methods were not all asked.
        done = [from_json(json.loads(part.read_text("utf-8"))) for part in parts if part not in failed]
    if done:
        arguments.out.write_text(json.dumps(merge(done).to_json(marks=True)) + "\n", "utf-8")
        print(f"{len(done)} of {len(parts)} parts in {arguments.out}")
    return 1 if failed else 0


def _start(part: Path, number: int, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """One `xkv eval` on one thread: as many as there are cores would fight over them otherwise."""
    shard = ["--shard", f"{number}/{arguments.processes}", "--out", str(part)]
    with part.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "xkv_cli", "eval", *arguments.options, *shard],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )


if __name__ == "__main__":
    sys.exit(main())
