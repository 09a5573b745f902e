"""Benchmarks that start servers find what they share with tests and examples, run by a path from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.mark.parametrize("name", ["autoscaling", "serve", "traffic"])
def test_it_finds_what_it_needs(tmp_path: Path, name: str) -> None:
    lines = ["import sys", f"sys.path.insert(0, {str(BENCHMARKS)!r})", f"import {name}", "import served"]
    if name == "traffic":
        lines += ["import redis_server, traffic_faults, traffic_redis", "import examples.local_server"]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(lines)],
        cwd=tmp_path, env=alone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
