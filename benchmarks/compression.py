"""Time of compression against bare prefill, and stored bytes against the full cache, bundled model on a CPU.

python benchmarks/compression.py --out benchmarks/results/compression.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bundled import document_ids, file_bytes, load
from report import Report, command
from transformers import DynamicCache, PreTrainedModel

from xkv_service import CompressionSpec
from xkv_service.compression import compress_prefill
from xkv_service.factors import PrefixFactors
from xkv_service.fidelity import held_back
from xkv_service.prefilling.prefill import prefill


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    loaded = load()
    report = Report("compression", command(), "prefill of the same prefix, one forward")
    _compressed(loaded.model, document_ids(loaded, 256), CompressionSpec(ratio=2.0))
    for tokens in arguments.lengths:
        ids = document_ids(loaded, tokens)
        bare = _median(lambda ids=ids: _bare_prefill(loaded.model, ids), arguments.repeats)
        for ratio in arguments.ratios:
            spec = CompressionSpec(ratio=ratio)
            runs = [_compressed(loaded.model, ids, spec) for _ in range(arguments.repeats)]
            seconds, factors = median(run[0] for run in runs), runs[0][1]
            report.add(
                tokens=tokens,
                ratio=ratio,
                bare_prefill_s=bare,
                compress_s=seconds,
                **{"compress_%": 100 * seconds / bare},
                **_sizes(factors, file_bytes(loaded, factors)),
            )
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compression.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4.0, 8.0, 16.0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the median is kept")
    parser.add_argument("--threads", type=int, default=1, help="more cost time in a model this small")
    return parser.parse_args()


def _bare_prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)


def _median(function: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return median(times)


def _compressed(
    model: PreTrainedModel, ids: torch.Tensor, spec: CompressionSpec
) -> tuple[float, PrefixFactors]:
    """Seconds of compression alone (fidelity included), and its result."""
    exact = prefill(model, ids, tail=held_back(ids.numel()))
    started = time.perf_counter()
    factors = compress_prefill(model, exact, spec)
    return time.perf_counter() - started, factors


def _sizes(factors: PrefixFactors, stored: int) -> dict[str, Any]:
    assert factors.fidelity is not None
    return {
        "bytes_full": factors.bytes_full,
        "bytes_stored": stored,
        "measured_ratio": factors.bytes_full / stored,
        "rank_k": factors.groups[0].keys.rank,
        "rank_v": factors.groups[0].values.rank,
        "top1_agreement": factors.fidelity.top1_agreement,
        "kl": factors.fidelity.kl,
    }


if __name__ == "__main__":
    main()
