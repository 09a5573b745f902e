"""A decode step over factors of calibrations with other groups of layers, in turn.

    python tools/make_demo_calibration.py --documents 16 --group-size 8 --out groups.safetensors
    python benchmarks/group_steps.py groups.safetensors --out benchmarks/results/group_steps.json

Processor time of one token on one thread of a CPU, the median of 40 steps; the first calibration is the
bundled one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from bundled import document_ids, load
from report import Report, command

from xkv_service import XKVCache, enable_xkv
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill
from xkv_service.demo import demo_calibration_path
from xkv_service.prefilling.prefill import prefill

STEPS = 40


def main() -> None:
    """Measure; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibrations", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/group_steps.json"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ratios", type=float, nargs="+", default=[20.0, 32.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load()
    report = Report("group_steps", command(), "the bundled calibration, at equal bytes")
    found = [read_calibration_file(path) for path in (demo_calibration_path(), *arguments.calibrations)]
    with torch.no_grad(), enable_xkv(loaded.model):
        exact = prefill(loaded.model, document_ids(loaded, arguments.tokens))
        for ratio in arguments.ratios:
            made = [
                factorize_prefill(loaded.model, exact, calibrated_spec(ratio, one), one)[0] for one in found
            ]
            caches = [XKVCache.from_factors(loaded.model, factors) for factors in made]
            times: list[list[float]] = [[] for _ in caches]
            for _ in range(STEPS):
                for cache, mine in zip(caches, times, strict=True):
                    started = time.process_time()
                    loaded.model(torch.tensor([[5]]), past_key_values=cache)
                    mine.append(time.process_time() - started)
            for factors, mine in zip(made, times, strict=True):
                report.add(
                    ratio=ratio, stored=factors.bytes_full / factors.nbytes,
                    layers_a_group=max(len(group.layout.layers) for group in factors.groups),
                    step_ms=1000 * median(mine), times_bundled=median(mine) / median(times[0]),
                )  # fmt: skip
    report.write(arguments.out, tokens=arguments.tokens, steps=STEPS)


if __name__ == "__main__":
    main()
