"""Compression overhead over bare prefill with Llama-3.1-8B shapes (random weights), one GPU.

python benchmarks/gpu/compression.py --out benchmarks/results/gpu_compression.json

For each prefix length: the model's own prefill (one forward, Transformers' cache), this project's observed
prefill in chunks, compression at 8x in groups of 4 with everything counted, split into stages, peak memory,
bytes per token, and the error against the optimal one of the same rank. `--ways` also compresses with a
calibration, made here of two other documents: "warm" finds the document's own bases from its directions,
"shared" has one product with its bases, in mixed bits or ("shared8") in 8. `--tiny` runs the same code in
seconds on a CPU; `--primitives` times the linear algebra that compression chooses from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import Report, command

from xkv_service import CompressionSpec, compression, fidelity
from xkv_service.calibration.bases import shared_group
from xkv_service.calibration.calibration import CalibratedGroup, Calibration, Kind
from xkv_service.calibration.moments import Moments
from xkv_service.factorization import factorize, group_factors, projected_factors
from xkv_service.factorization.features import Features
from xkv_service.factorization.subspace import subspace_iteration
from xkv_service.fidelity import held_back
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.prefilling.prefill import prefill
from xkv_service.selection.sketch import candidate_planes

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = {
    **LLAMA_8B,
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_CALIBRATION = "0" * 64
_WAYS: dict[str, dict[str, Any]] = {
    "own": {},
    "warm": {"calibration": _CALIBRATION, "base_dtype": "int8"},
    "shared": {"calibration": _CALIBRATION, "basis": "calibrated", "factor_dtype": "mixed"},
    "shared8": {"calibration": _CALIBRATION, "basis": "calibrated"},
}
"""What the spec of a way says."""


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    device = "cpu" if arguments.tiny else "cuda"
    model = _model(TINY if arguments.tiny else LLAMA_8B, device)
    inspect_loaded(model)
    report = Report("gpu_compression", command(), "prefill of the same prefix, one forward")
    extra: dict[str, Any] = {"primitives": primitives(device, arguments.tiny)} if arguments.primitives else {}
    lengths = (
        [512, 1024] if arguments.tiny else [int(length) * 1024 for length in arguments.lengths.split(",")]
    )
    short, ratio = (256, 2.0) if arguments.tiny else (8192, 8.0)
    ways = arguments.ways.split(",")
    calibration = _calibration(model, short) if ways != ["own"] else None
    for tokens in (short, *lengths):
        for way in ways:
            spec = CompressionSpec(ratio=ratio, **_WAYS[way])
            repeats = 1 if tokens == short else arguments.repeats
            known = calibration if spec.calibration else None
            row = _measure(model, tokens, spec, known, repeats)
            if tokens != short:  # which has warmed up
                report.add(**{"tokens": tokens, "way": way, **row})
    report.write(arguments.out, model="Llama-3.1-8B shapes, random weights", **extra)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_compression.json"))
    parser.add_argument("--lengths", default="32,64,128", help="thousands of tokens, comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="runs per length, the median is kept")
    parser.add_argument("--ways", default="own", help=f"comma-separated: {', '.join(_WAYS)}")
    parser.add_argument("--primitives", action="store_true", help="also time the linear algebra alone")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: checks this script")
    return parser.parse_args()


def _model(fields: dict[str, Any], device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def _calibration(model: PreTrainedModel, tokens: int) -> Calibration:
    """Of two documents of random tokens: groups of four, all errors alike, planes in no order."""
    layers = inspect_loaded(model).layout.compressible
    moments = Moments.empty(layers, 3, model.device)
    for seed in (1, 2):
        exact = prefill(model, _ids(model, tokens, seed))
        moments.observe(exact, 4)
        planes = {
            one.index: candidate_planes(exact.planes(one.index), one.head_dim).to(torch.int16)
            for one in layers
        }
        exact.free()

    def alike(place: int, kind: Kind) -> torch.Tensor:
        heads, dim = layers[place].kv_heads, layers[place].head_dim
        return torch.eye(dim, dtype=torch.float64, device=model.device).expand(heads, dim, dim)

    return Calibration(
        tuple(_on_host(shared_group(moments, first, 4, alike)) for first in range(0, len(layers), 4)),
        {one.index: planes[one.index].expand(one.kv_heads, -1, -1) for one in layers},
        id=_CALIBRATION,
    )


def _on_host(group: CalibratedGroup) -> CalibratedGroup:
    """With three eighths of its directions, as a file has them."""
    kept, host = 3 * len(group.keys.energies) // 8, torch.device("cpu")
    some = group.leading(kept, kept)
    assert some.values is not None
    return CalibratedGroup(some.layers, some.keys.to(host), some.values.to(host))


def _ids(model: PreTrainedModel, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))


def _measure(
    model: PreTrainedModel, tokens: int, spec: CompressionSpec, calibration: Calibration | None, repeats: int
) -> dict[str, Any]:
    ids = _ids(model, tokens, tokens)
    bare, bare_peak = _median(lambda: _bare_prefill(model, ids), repeats, model.device)
    exact_seconds, _ = _median(lambda: prefill(model, ids, tail=held_back(tokens)), repeats, model.device)
    _reset_peak(model.device)
    times, factors = [], None
    for _ in range(repeats):
        del factors  # a second set of them is no part of the peak
        seconds, factors = _compress(model, ids, spec, calibration)
        times.append(seconds)
    seconds, peak = sorted(times)[repeats // 2], _peak(model.device)
    stages, excess = _staged(model, ids, spec, calibration)
    started = time.perf_counter()
    stored = sum(tensor.nbytes for tensor in factors.to_tensors().values())
    copied = time.perf_counter() - started
    assert factors.fidelity is not None
    group = factors.groups[0].layout
    return {
        "bare_prefill_s": bare,
        "observed_prefill_s": exact_seconds,
        "compress_s": seconds,
        "overhead_%": 100 * (exact_seconds + seconds - bare) / bare,
        "compress_only_%": 100 * seconds / bare,
        **{f"{name}_ms": 1000 * value for name, value in stages.items()},
        "to_host_s": copied,
        "peak_gib": peak,
        "bare_peak_gib": bare_peak,
        "rank_k": group.rank_k,
        "rank_v": group.rank_v,
        "bytes_per_token": stored / tokens,
        "full_bytes_per_token": factors.bytes_full / tokens,
        "excess_error_%": excess,
        "key_error": factors.fidelity.key_error[0],
        "value_error": factors.fidelity.value_error[0],
        "top1_agreement": factors.fidelity.top1_agreement,
    }


def _bare_prefill(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)


def _compress(
    model: PreTrainedModel, ids: torch.Tensor, spec: CompressionSpec, calibration: Calibration | None
) -> tuple[float, Any]:
    """Seconds of compression alone, and the factors."""
    exact = prefill(model, ids, tail=held_back(ids.numel()))
    seconds, factors = _timed(
        lambda: compression.compress_prefill(model, exact, spec, calibration), model.device
    )
    exact.free()
    return seconds, factors


@dataclass
class Stages:
    """Seconds of each stage (the device is waited for, so their sum is a little more than the whole)."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    excess: list[float] = field(default_factory=list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to stage `name`."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            took, result = _timed(lambda: function(*args, **kwargs), self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            return result

        return measured

    def compared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`factorize`, its first and last result held against an eigensolver in float64."""

        def measured(grams: torch.Tensor, ranks: list[int], *rest: Any) -> Any:
            results = function(grams, ranks, *rest)
            for number in (0, -1):
                gram, basis = grams[number].double(), results[number].projection
                optimal = torch.linalg.eigvalsh(gram)[: -ranks[number]].clamp_min(0).sum().sqrt()
                reached = (gram.trace() - (basis * (gram @ basis)).sum()).clamp_min(0).sqrt()
                self.excess.append(100 * (float(reached / optimal) - 1) if optimal > 0 else 0.0)
            return results

        return measured


def _staged(
    model: PreTrainedModel, ids: torch.Tensor, spec: CompressionSpec, calibration: Calibration | None
) -> tuple[dict[str, float], float | None]:
    """Seconds per stage, and the largest excess (percent) over the optimal error of own bases."""
    stages = Stages(model.device)
    work = group_factors._Work
    with _replaced(
        (group_factors, "accumulate_gram", lambda f: stages.timed("gram", f)),
        (group_factors, "factorize", lambda f: stages.timed("eigenvectors_all", f)),
        (factorize, "leading_eigenvectors", lambda f: stages.timed("eigenvectors", f)),
        (work, "_weights", lambda f: stages.timed("weights", f)),
        (work, "_low_rank", lambda f: stages.timed("projection", f)),
        (projected_factors, "_project", lambda f: stages.timed("projection", f)),
        (Features, "project", lambda f: stages.timed("product", f)),
        (projected_factors, "quantize_runs", lambda f: stages.timed("rounding", f)),
        (projected_factors, "_error", lambda f: stages.timed("error", f)),
        (compression, "index_layers", lambda f: stages.timed("index", f)),
        (compression, "certify", lambda f: stages.timed("fidelity", f)),
        (fidelity, "_replace", lambda f: stages.timed("rebuild", f)),
    ):
        exact = prefill(model, ids, tail=held_back(ids.numel()))
        compression.compress_prefill(model, exact, spec, calibration)
        exact.free()
    with _replaced((group_factors, "factorize", stages.compared)):
        exact = prefill(model, ids)
        compression.factorize_prefill(model, exact, spec, calibration)
        exact.free()
    return stages.seconds, max(stages.excess, default=None)


@contextmanager
def _replaced(
    *targets: tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]],
) -> Iterator[None]:
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    try:
        for owner, name, wrap in targets:
            setattr(owner, name, wrap(getattr(owner, name)))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    _wait(device)
    started = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - started, result


def _median(function: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds, and the peak GiB."""
    _reset_peak(device)
    times = []
    for _ in range(repeats):
        took, result = _timed(function, device)
        if result is not None:
            result.free()
        times.append(took)
    return sorted(times)[len(times) // 2], _peak(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def primitives(device: str, tiny: bool) -> dict[str, float]:
    """Milliseconds of the linear algebra alone, 16 matrices as Llama-3.1-8B has."""
    width, rank, count, rows = (256, 20, 2, 512) if tiny else (4096, 512, 16, 32768)
    size = rank + 64
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    gram = (x.float().T @ x.float())[None].repeat(count, 1, 1)
    half = torch.randn(count, size, 2 * size, device=device, dtype=torch.float64)
    small, tall = half @ half.mT, torch.randn(count, width, size, device=device, dtype=torch.float64)
    tall32 = tall.float()
    eye = torch.eye(size, device=device, dtype=torch.float64).expand(count, size, size)
    cases: dict[str, Callable[[], Any]] = {
        "subspace_iteration": lambda: subspace_iteration(gram, rank),
        "gram @ basis, float32": lambda: gram @ tall32,
        "basisᵀ basis, float64": lambda: tall.mT @ tall,
        "torch cholesky + triangular inverse, float64": lambda: torch.linalg.solve_triangular(
            torch.linalg.cholesky_ex(small).L, eye, upper=False
        ),
        "batched eigh of the small matrices, float64": lambda: torch.linalg.eigh(small),
        "batched eigh of the small matrices, float32": lambda: torch.linalg.eigh(small.float()),
        "eigh of one gram, float64": lambda: torch.linalg.eigh(gram[0].double()),
    }
    if device == "cuda":
        cases["bf16 gram of 32768 rows"] = lambda: torch.mm(x.T, x, out_dtype=torch.float32)
    times = {}
    for name, function in cases.items():
        function()
        times[name] = 1000 * _timed(function, torch.device(device))[0]
        print(f"{name}: {times[name]:.2f} ms", flush=True)
    return times


if __name__ == "__main__":
    main()
