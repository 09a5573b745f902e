"""Whether Gram matrices, or a whole compression, cost less beside a prefill than behind it.

python benchmarks/gpu/beside_prefill.py --out benchmarks/results/gpu/beside_prefill.json

A prefill of one document fills a stream of its own while the Gram matrices of another, or its whole
compression, fill a second one from a second thread, at the lower priority or at the same. What the pair
takes beside each other is set against one after the other: the gain a Gram matrix accumulated during a
chunked prefill could have. Llama-3.1-8B shapes, random weights; `--tiny` runs the same code on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from compression import LLAMA_8B, TINY, _ids, _model
from report import Report, command

from xkv_service import CompressionSpec, compression
from xkv_service.factorization.factorize import factorize
from xkv_service.factorization.features import Features, features_of
from xkv_service.factorization.gram import accumulate_gram, gram_dtype
from xkv_service.factorization.ranks import size_of
from xkv_service.fidelity import held_back
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill

Call = Callable[[], object]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu/beside_prefill.json"))
    parser.add_argument("--tokens", type=int, default=64, help="thousands of tokens of both documents")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, the median is kept")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: checks this script")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    model = _model(TINY if arguments.tiny else LLAMA_8B, str(device))
    inspect_loaded(model)
    tokens = 1024 if arguments.tiny else 1024 * arguments.tokens
    spec = CompressionSpec(ratio=2.0 if arguments.tiny else 8.0)
    first = prefill(model, _ids(model, tokens, 1), tail=held_back(tokens))
    other = _ids(model, tokens, 2)
    grams = _Grams(first, spec)

    def prefilled() -> None:
        prefill(model, other, tail=held_back(tokens)).free()

    def compressed() -> None:
        _factorized(model, first, spec)

    report = Report("beside_prefill", command(), "one after the other, in the same process")
    for name, work in {"Gram matrices": grams, "factorization": compressed}.items():
        for priority in (0, -1):
            report.add(work=name, **_compared(prefilled, work, device, priority, arguments.repeats))
    report.add(work="eigenvectors", **_compared(prefilled, grams.factored, device, -1, arguments.repeats))
    report.write(arguments.out, model="Llama-3.1-8B shapes, random weights", tokens=tokens)


class _Grams:
    """XᵀX of every group of a prefill, as factorization makes them."""

    def __init__(self, exact: Prefill, spec: CompressionSpec) -> None:
        _, use = compression.rotary_tables(exact)
        layouts = size_of(exact.layout, exact.tokens, spec, use, None).groups
        self._parts = [part for layout in layouts for part in features_of(exact, layout)]
        width, self._device = sum(self._parts[0].widths), exact.device
        dtype = gram_dtype(self._parts[0].product_dtype)
        self.matrices = torch.zeros(len(self._parts), width, width, dtype=dtype, device=exact.device)
        self()

    @torch.no_grad()
    def __call__(self) -> None:
        """Make them anew."""
        self.matrices.zero_()
        for part, out in zip(self._parts, self.matrices, strict=True):
            self._gram(part, out)

    def _gram(self, part: Features, out: torch.Tensor) -> None:
        accumulate_gram(
            part.read,
            part.widths,
            (0, part.exact.tokens),
            chunk_tokens=part.chunk_tokens,
            dtype=part.product_dtype,
            device=self._device,
            out=out,
        )

    @torch.no_grad()
    def factored(self) -> None:
        """Their leading eigenvectors, without weights."""
        factorize(self.matrices.clone(), [part.rank for part in self._parts], [None] * len(self._parts), [])


def _factorized(model: PreTrainedModel, exact: Prefill, spec: CompressionSpec) -> None:
    compression.factorize_prefill(model, exact, spec)


def _compared(
    prefilled: Call, work: Call, device: torch.device, priority: int, repeats: int
) -> dict[str, float]:
    """Medians in milliseconds of each alone and of both at once; the prefill's stream has `priority`."""
    alone = [_together([(prefilled, priority)], device) for _ in range(repeats)]
    worked = [_together([(work, 0)], device) for _ in range(repeats)]
    both = [_together([(prefilled, priority), (work, 0)], device) for _ in range(repeats)]
    first, second, beside = (1000 * median(one) for one in (alone, worked, both))
    return {
        "priority": priority,
        "prefill_ms": first,
        "work_ms": second,
        "beside_ms": beside,
        "hidden_%": 100 * (first + second - beside) / second,
    }


def _together(calls: list[tuple[Call, int]], device: torch.device) -> float:
    """Seconds until all calls have ended, each on a thread and a stream of its own."""
    threads = [threading.Thread(target=_on_a_stream, args=(call, device, one)) for call, one in calls]
    _wait(device)
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _wait(device)
    return time.perf_counter() - started


def _on_a_stream(call: Call, device: torch.device, priority: int) -> None:
    cuda = device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(device, priority)) if cuda else nullcontext():
        call()
        if cuda:
            torch.cuda.current_stream().synchronize()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
