"""Peak host memory of precomputing one long document on a CPU, against the size of its exact cache.

python benchmarks/host_memory.py --out benchmarks/results/host_memory.json

Each measurement is a process of its own; what it has after loading the model is its baseline. A bare prefill
of the same document shows what the model itself needs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from report import Report, command

MODES = ("bare prefill", "precompute")


def main() -> None:
    """Measure in child processes, print a table, write JSON."""
    arguments = _arguments()
    if arguments.mode:
        print(json.dumps(_measure(arguments.mode, arguments.tokens)))
        return
    report = Report("host_memory", command(), "memory after the model is loaded")
    for mode in MODES:
        measuring = [sys.executable, __file__, "--mode", mode, "--tokens", str(arguments.tokens)]
        answer = subprocess.run(measuring, check=True, capture_output=True, text=True).stdout
        measured = json.loads(answer.splitlines()[-1])
        peak = measured["peak_mib"] - measured["baseline_mib"]
        report.add(
            mode=mode,
            tokens=arguments.tokens,
            **measured,
            above_mib=peak,
            times_cache=peak / measured["cache_mib"],
        )
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host_memory.json"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(mode: str, tokens: int) -> dict[str, float]:
    """Baseline and peak of this process in MiB, and the exact cache's size as it was computed."""
    import torch
    from bundled import document_ids, load

    from xkv_service import CompressionSpec, compress
    from xkv_service.prefilling.prefill import prefill

    torch.set_num_threads(1)
    loaded = load()
    ids = document_ids(loaded, tokens)
    prefill(loaded.model, ids[:64]).free()
    baseline = _peak_mib()
    if mode == "bare prefill":
        prefill(loaded.model, ids)
    else:
        compress(loaded.model, ids, CompressionSpec()).to_tensors()
    config = loaded.model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return {
        "baseline_mib": baseline,
        "peak_mib": _peak_mib(),
        "cache_mib": numbers * loaded.model.dtype.itemsize / 2**20,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
