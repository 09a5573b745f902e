"""Decode from factors on a CPU: time per token and to the first token, and memory of many sessions.

python benchmarks/decode.py --out benchmarks/results/decode.json

Baseline: the full cache of the same prefix in the same process. Steps of the full cache and of the factors
take turns, so that noise of the machine meets both; medians and the ratio are reported. The model `random` is
larger and has random weights: its answers mean nothing, its times do.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bundled import document_ids, load
from report import Report, command
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from xkv_artifacts.format import read_prefix, write_prefix
from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, ModelIdentity, PrefixManifest
from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill
from xkv_service.factors import PrefixFactors
from xkv_service.prefilling.prefill import prefill

LARGER = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,
}
QUESTION = 32


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    report = Report("decode", command(), "full cache of the same prefix")
    for name in arguments.model.split(","):
        model, ids = _model(name, max(map(int, arguments.lengths.split(","))))
        with torch.no_grad(), enable_xkv(model):
            for tokens in map(int, arguments.lengths.split(",")):
                report.add(model=name, **_measure(model, ids[:tokens], arguments))
    report.write(arguments.out, note="float32, as a CPU computes; the full cache counts as it is held")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    parser.add_argument("--model", default="bundled,random")
    parser.add_argument("--lengths", default="1024,4096,8192,16384")
    parser.add_argument("--steps", type=int, default=15, help="decode steps, the median is kept")
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--calibration", type=Path, help="compress with the calibration in this file")
    return parser.parse_args()


def _model(name: str, tokens: int) -> tuple[PreTrainedModel, torch.Tensor]:
    if name == "bundled":
        loaded = load()
        return loaded.model, document_ids(loaded, tokens)
    torch.manual_seed(0)
    config = LlamaConfig(**LARGER, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = torch.randint(3, 2048, (tokens,), generator=torch.Generator().manual_seed(1))
    return LlamaForCausalLM._from_config(config, dtype=torch.float32).eval(), ids


def _measure(model: PreTrainedModel, ids: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    exact = prefill(model, ids)
    prefill_s = time.perf_counter() - started
    spec, calibration = _spec(arguments)
    factors, _ = factorize_prefill(model, exact, spec, calibration)
    full = _copied(model, exact.cache())
    caches: dict[str, Cache] = {"full": full}
    for name, spec in (
        ("sr_64", SelectionSpec(budget=64)),
        ("sr_256", SelectionSpec(budget=256)),
        ("sr_16th", SelectionSpec()),
        ("dense", SelectionSpec("dense")),
    ):
        caches[name] = XKVCache.from_factors(model, factors, spec)
    steps = _step_ms(model, caches, arguments.steps)
    row: dict[str, Any] = {"tokens": len(ids), **{f"{name}_ms": value for name, value in steps.items()}}
    row["sr_16th_ratio"] = steps["full"] / steps["sr_16th"]
    row |= _first_token(model, ids, factors, prefill_s, calibration)
    row |= _memory(model, factors, full, arguments.sessions)
    exact.free()
    gc.collect()
    return row


def _spec(arguments: argparse.Namespace) -> tuple[CompressionSpec, Calibration | None]:
    if arguments.calibration is None:
        return CompressionSpec(ratio=arguments.ratio), None
    calibration = read_calibration_file(arguments.calibration)
    return calibrated_spec(arguments.ratio, calibration), calibration


def _copied(model: PreTrainedModel, cache: DynamicCache) -> DynamicCache:
    """A cache that owns its keys and values."""
    full = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        full.update(layer.keys.clone(), layer.values.clone(), index)
    return full


def _step_ms(model: PreTrainedModel, caches: dict[str, Cache], steps: int) -> dict[str, float]:
    token = torch.tensor([[5]])
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(steps + 1):
        for name, cache in caches.items():
            times[name].append(_ms(lambda cache=cache: model(token, past_key_values=cache)))
    return {name: sorted(taken[1:])[steps // 2] for name, taken in times.items()}


def _ms(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def _first_token(
    model: PreTrainedModel,
    ids: torch.Tensor,
    factors: PrefixFactors,
    prefill_s: float,
    calibration: Calibration | None,
) -> dict[str, float]:
    """From a file to the first token of an answer, against prefilling again; the question has 32 tokens."""
    question = torch.arange(3, 3 + QUESTION)[None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prefix.safetensors"
        with path.open("wb") as file:
            write_prefix(file, _manifest(model, ids, factors), factors.to_tensors())
        times = [_ms(lambda: _answer_from(path, model, question, calibration)) for _ in range(3)]
    again = DynamicCache(config=model.config)
    model(ids[None], past_key_values=again, logits_to_keep=1)
    asked = _ms(lambda: model(question, past_key_values=again, logits_to_keep=1))
    ours = sorted(times)[1]
    exact = 1000 * prefill_s + asked
    return {"first_token_ms": ours, "prefill_first_token_ms": exact, "first_token_ratio": exact / ours}


def _answer_from(
    path: Path, model: PreTrainedModel, question: torch.Tensor, calibration: Calibration | None
) -> None:
    with path.open("rb") as file:
        factors = PrefixFactors.from_tensors(*read_prefix(file), calibration)
    model(question, past_key_values=XKVCache.from_factors(model, factors), logits_to_keep=1)


def _manifest(model: PreTrainedModel, ids: torch.Tensor, factors: PrefixFactors) -> PrefixManifest:
    from datetime import datetime, timezone

    if factors.fidelity is None:
        factors = factors.with_fidelity(compress(model, ids[:256], CompressionSpec(ratio=2)).fidelity)
    fields = factors.manifest_fields()
    return PrefixManifest(
        id=artifact_id("0" * 64, "benchmark", ids.tolist(), fields["spec"]),
        model=ModelIdentity(fingerprint="0" * 64, name="benchmark", architecture="Llama", dtype="float32"),
        namespace="benchmark",
        document=DocumentRef(uri="benchmark", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )


def _memory(
    model: PreTrainedModel, factors: PrefixFactors, full: DynamicCache, sessions: int
) -> dict[str, float]:
    """MiB of N sessions on one document with tails of 64 tokens, against N full caches."""
    caches = [XKVCache.from_factors(model, factors) for _ in range(sessions)]
    turn = torch.arange(3, 67)[None]
    for cache in caches:
        model(turn, past_key_values=cache, logits_to_keep=1)
    shared = _held_bytes(caches)
    exact = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    tail = caches[0].tail_bytes
    return {
        "sessions": sessions,
        "sessions_mib": shared / 2**20,
        "full_mib": sessions * (exact + tail) / 2**20,
        "memory_ratio": sessions * (exact + tail) / shared,
    }


def _held_bytes(caches: list[XKVCache]) -> int:
    """Bytes of every distinct storage that these caches reach."""
    seen: dict[int, int] = {}
    todo: list[Any] = [cache.layers for cache in caches]
    visited: set[int] = set()
    while todo:
        one = todo.pop()
        if id(one) in visited or isinstance(one, PreTrainedModel | torch.nn.Module | type):
            continue
        visited.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, list | tuple):
            todo += one
        elif isinstance(one, dict):
            todo += one.values()
        elif hasattr(one, "__dict__"):
            todo += vars(one).values()
    return sum(seen.values())


if __name__ == "__main__":
    main()
