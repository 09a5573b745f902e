"""Where the decode kernels spend their time: hardware counters of each, read by Nsight Compute.

python benchmarks/gpu/profile_kernels.py --out OUT/profile_kernels.json

One layer of `decode_kernels.py`'s case (8x, 32 sessions of 128k on documents of their own) runs once under
`ncu` (--ncu says where it is), and beside it plain products: of a large square, and of what rebuilding
multiplies, with its operands as they would be if nothing had to be gathered or unpacked. A row is a kernel:
its time, how busy memory, caches, tensor cores and instruction issue were, what its warps waited for, and
what stopped more of them from being there.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import synthetic
from decode_kernels import Case
from report import Report, command

_METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "memory_%": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_%": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed", 1),
    "l1_%": ("l1tex__throughput.avg.pct_of_peak_sustained_active", 1),
    "issue_%": ("sm__inst_issued.avg.pct_of_peak_sustained_active", 1),
    "warps_%": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
    "shared_kb": ("launch__shared_mem_per_block_dynamic", 1e-3),
    "mb_read": ("dram__bytes_read.sum", 1e-6),
    "l2_mb": ("lts__t_bytes.sum", 1e-6),
}
"""Column of the table: counter, and what it is multiplied with."""
_SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy",
    "LaunchStats", "SchedulerStats",
)  # fmt: skip
_PIPE = re.compile(
    r"sm__(?:inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_sustained_active"
)
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
_LIMIT = re.compile(r"launch__occupancy_limit_(\w+)")


def main() -> None:
    """Profile, print a table, write JSON."""
    arguments = _arguments()
    if arguments.run:
        _run(arguments)
        return
    report = Report("profile_kernels", command(), "plain products of the same run")
    with tempfile.TemporaryDirectory() as folder:
        result = _profile(arguments, Path(folder))
        rows = list(_kernels(_page(arguments.ncu, result, "raw")))
        if arguments.raw:
            arguments.raw.write_text(_page(arguments.ncu, result, "raw"))
    for row in rows:
        report.add(**row)
    report.write(arguments.out, metrics={name: one for name, (one, _) in _METRICS.items()})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("profile_kernels.json"))
    parser.add_argument("--raw", type=Path, help="also write every counter, as ncu prints it")
    parser.add_argument("--kind", default="8x", help="how factors are stored")
    parser.add_argument("--batch", type=int, default=32, help="sessions")
    parser.add_argument("--tokens", type=int, default=128, help="thousands of tokens of a document")
    parser.add_argument("--budget", type=int, default=2048, help="tokens that a session chooses")
    parser.add_argument("--ncu", default=shutil.which("ncu") or "ncu", help="Nsight Compute")
    parser.add_argument("--run", action="store_true", help="what ncu watches; by itself it prints nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks what is run")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    """One layer's kernels and the plain products, between marks that the profiler begins and ends at."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = synthetic.SMOKE if arguments.smoke else synthetic.LLAMA_8B
    tokens, budget = (160, 24) if arguments.smoke else (1024 * arguments.tokens, arguments.budget)
    kind = synthetic.kind_of(arguments.kind, shape, tokens)
    case = Case(shape, kind, arguments.batch, tokens, budget, False, device, 1)
    stages = case.stages(case.attention())
    rank, edge = case.tables[0].documents[0].key_rows.layout.rank, 64 if arguments.smoke else 8192

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device)

    square, rows = drawn(edge, edge), drawn(arguments.batch, case.most, rank)
    bases = drawn(arguments.batch, rank, shape.kv_heads * shape.dim)

    def everything() -> None:
        stages["all"](case.tables[0])
        torch.mm(square, square)
        torch.bmm(rows, bases)

    everything()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        everything()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def _profile(arguments: argparse.Namespace, folder: Path) -> Path:
    """ncu's result file. Clocks are left as they are."""
    result = folder / "kernels.ncu-rep"
    watched = [
        sys.executable, __file__, "--run", "--kind", arguments.kind, "--batch", str(arguments.batch),
        "--tokens", str(arguments.tokens), "--budget", str(arguments.budget),
    ]  # fmt: skip
    sections = [option for section in _SECTIONS for option in ("--section", section)]
    counters = ",".join(counter for counter, _ in _METRICS.values())
    done = subprocess.run(
        [
            arguments.ncu, "--clock-control", "none", "--profile-from-start", "off", *sections, "--metrics",
            counters, "--force-overwrite", "--export", str(result.with_suffix("")), *watched,
        ],
        capture_output=True, text=True, env=os.environ, check=False,
    )  # fmt: skip
    if done.returncode or not result.exists():
        sys.exit(f"ncu failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return result


def _page(ncu: str, result: Path, page: str, *options: str) -> str:
    """A page of the result as CSV, without what ncu prints before the header."""
    reading = [ncu, "--import", str(result), "--page", page, "--csv", "--print-units", "base", *options]
    printed = subprocess.run(reading, capture_output=True, text=True, check=True).stdout
    first = re.search(r'^"(?:ID|#|Address|Kernel Name)"?.*$', printed, re.MULTILINE)
    return printed[first.start() :] if first else printed


def _kernels(raw: str) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a raw page, whose second line has units."""
    header, _, *lines = csv.reader(io.StringIO(raw))
    for line in lines:
        found = dict(zip(header, line, strict=False))
        row: dict[str, Any] = {"kernel": found["Kernel Name"].split("(")[0][:48]}
        for name, (counter, factor) in _METRICS.items():
            row[name] = _number(found.get(counter, "")) * factor
        pipes = _matching(found, _PIPE)
        row["pipes_%"] = {name: round(pipes[name], 1) for name in _largest(pipes, 4)}
        stalls = _matching(found, _STALL)
        row["waits"] = {name: round(stalls[name], 2) for name in _largest(stalls, 4)}
        row["blocks_at_most"] = {name: int(value) for name, value in _matching(found, _LIMIT).items()}
        yield row


def _matching(found: dict[str, str], pattern: re.Pattern[str]) -> dict[str, float]:
    matches = ((pattern.fullmatch(name), value) for name, value in found.items())
    return {match[1]: _number(value) for match, value in matches if match}


def _largest(values: dict[str, float], count: int) -> Sequence[str]:
    return sorted(values, key=lambda name: -values[name])[:count]


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


if __name__ == "__main__":
    main()
