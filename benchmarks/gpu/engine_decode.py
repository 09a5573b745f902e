"""Decode steps of the engine's own runner over real prefixes of a Llama-3.1-8B-shaped model, one GPU.

python benchmarks/gpu/engine_decode.py --tokens 128 --batches 1,8,27 --out OUT/engine_decode_128.json
python benchmarks/gpu/engine_decode.py --tokens 8,16,32,64 --batches 4,32 --out OUT/engine_decode_lengths.json
TRITON_INTERPRET=1 python benchmarks/gpu/engine_decode.py --tiny --out tiny.json       # small, on a CPU

Random weights, documents of random tokens compressed by `compress`; every session has a copy of its factors
of its own, of several lengths as many of each, or all are on one document (`--documents one`; side "rebuilt":
its keys and values are rebuilt, a layer a step, and kept). Timed on the clock: a step of all sessions with
everything that the engine does for it, the choice of tokens included (greedy, or drawn with top_p 0.9). By
CUDA graphs, by kernels without a graph, and in PyTorch. What joins and leaves costs is timed too; `runner_s`
is what an engine's runner takes to start, compiling included where the process has not done so before.
`decode_step.py` has the fastest whole cache.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from compression import LLAMA_8B, TINY
from report import Report, command

from xkv_service import CompressionSpec, SelectionSpec, XKVCache, compress, enable_xkv
from xkv_service.decoding import kernel_choice
from xkv_service.engine import graph_runner, rebuilt_prefixes
from xkv_service.engine.graph_runner import GraphRunner
from xkv_service.engine.runners import PackedRunner, Runner
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.joined_products import join_products
from xkv_service.sessions.context import Context
from xkv_service.sessions.sampling import Sampler, choose
from xkv_service.sessions.settings import GenerationSettings

_QUESTION = 32
"""Tokens behind the document before the steps begin."""


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = _model(TINY | {"head_dim": 32} if arguments.tiny else LLAMA_8B, device)
    sizes = [320, 280] if arguments.tiny else [1024 * int(one) for one in arguments.tokens.split(",")]
    sizes = sizes[:1] if arguments.documents == "one" else sizes
    report = Report("engine_decode", command(), "the same steps by kernels without a graph")
    spec = CompressionSpec(ratio=2.0 if arguments.tiny else arguments.ratio, factor_dtype="int8")
    documents = [compress(model, torch.randint(3, model.config.vocab_size, (size,)), spec) for size in sizes]
    print(f"compressed {len(sizes)} documents", flush=True)
    selection = SelectionSpec("sketch", 64 if arguments.tiny else arguments.budget)
    batches = [1, 2] if arguments.tiny else [int(one) for one in arguments.batches.split(",")]
    started = time.monotonic()
    with torch.no_grad(), enable_xkv(model):
        todo = [(variant, batch) for variant in arguments.variants.split(",") for batch in batches]
        for variant, batch in todo:
            kernel_choice.COMPILES = variant == "compiled"
            if variant != "plain":  # from now on: plain ones come first
                join_products(model)
            for side in arguments.sides.split(","):
                if time.monotonic() - started > arguments.seconds:
                    break
                given = [documents[number % len(documents)] for number in range(batch)]
                if row := _measured(model, side, given, selection, arguments):
                    tokens = sizes[0] if len(sizes) == 1 else "/".join(map(str, sizes))
                    report.add(tokens=tokens, variant=variant, **row)
    _compare(report)
    report.write(arguments.out, budget=selection.budget, ratio=arguments.ratio, question=_QUESTION)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tokens", default="128", help="thousands of tokens of a document; several: as many of each"
    )
    parser.add_argument("--batches", default="1,8,32", help="sessions, comma-separated")
    parser.add_argument("--sides", default="graph,drawn,kernels,pytorch", help="of these, and rebuilt")
    parser.add_argument(
        "--documents", choices=("own", "one"), default="own", help="one: all share a document"
    )
    parser.add_argument(
        "--variants",
        default="compiled",
        help="plain, joined, compiled: products as they are, then those of one input joined, then norms and "
        "rotary embedding compiled, too",
    )
    parser.add_argument("--budget", type=int, default=2048, help="tokens that a session chooses in a layer")
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--seconds", type=float, default=400, help="begin nothing after so long")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: checks this script")
    return parser.parse_args()


def _model(fields: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def _measured(
    model: PreTrainedModel, side: str, factors: list[PrefixFactors], selection: SelectionSpec,
    arguments: argparse.Namespace,
) -> dict[str, Any] | None:  # fmt: skip
    before = kernel_choice.DEVICES
    kernel_choice.DEVICES = () if side == "pytorch" else ("cuda", "cpu")
    try:
        if side == "rebuilt" and len(factors) < rebuilt_prefixes.MANY:
            return None
        own, steps = arguments.documents == "own", 3 if arguments.tiny else arguments.steps
        return _timed(model, side, factors, selection, steps, own=own)
    except torch.OutOfMemoryError:
        print(f"out of memory: {side}, {len(factors)} sessions", flush=True)
        return None
    finally:
        kernel_choice.DEVICES = before
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _timed(
    model: PreTrainedModel, side: str, factors: list[PrefixFactors], selection: SelectionSpec, steps: int, *,
    own: bool,
) -> dict[str, Any]:  # fmt: skip
    began = time.perf_counter()
    runner: Runner = PackedRunner(model)
    if side in ("graph", "drawn", "rebuilt"):
        runner = GraphRunner(model, 2**35 if side == "rebuilt" else 0)
    runner_s = time.perf_counter() - began
    contexts = []
    for one in factors:  # a copy's factors that are laid out anew as rows go at once
        cache = XKVCache.from_factors(model, copy.deepcopy(one) if own else one, selection)
        contexts.append(Context(model, cache, one.token_ids.tolist()))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    settings = GenerationSettings(temperature=1.0, top_p=0.9) if side == "drawn" else GenerationSettings()
    samplers = [Sampler(settings) for _ in contexts]
    asked = torch.randint(3, 90, (_QUESTION,)).tolist()
    todo = [asked for _ in contexts]

    def step() -> None:
        logits = runner.run(list(zip(contexts, todo, strict=True)))
        todo[:] = [[token] for token in choose(samplers, logits)]

    begun = [_seconds(step, model.device)]
    while side == "rebuilt" and len(begun) < 100 and not _all_share(runner):
        begun.append(_seconds(step, model.device))
    if side == "rebuilt":  # a graph of its documents, which cuDNN reads, is made after so many steps
        begun += [_seconds(step, model.device) for _ in range(graph_runner.SETTLED + 1)]
    took = [begun[0], *(_seconds(step, model.device) for _ in range(steps + 3))]
    row = {
        "side": side, "batch": len(factors), "ms": 1000 * sorted(took[3:])[len(took[3:]) // 2],
        "runner_s": runner_s, "first_step_ms": 1000 * took[1],
        "GiB_on_device": torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else 0.0,
    }  # fmt: skip
    if side == "rebuilt":
        assert isinstance(runner, GraphRunner)
        rebuilding = begun[1 : -graph_runner.SETTLED - 1]
        row |= {"rebuilding_steps": len(rebuilding), "rebuilding_step_ms": 1000 * median(rebuilding)}
        row["by_cudnn"] = bool(runner.fixed_documents)
        row |= {"longest_step_ms": 1000 * max(begun[3:])}
    if side == "graph" and len(contexts) > 2:  # one leaves, then comes back: another graph, or another table
        leaving, rest = contexts.pop(), todo.pop()
        runner.settle(leaving)
        samplers.pop()
        row["leaving_ms"] = 1000 * _seconds(step, model.device)
        contexts.append(leaving), todo.append(rest), samplers.append(Sampler(settings))
        row["joining_ms"] = 1000 * _seconds(step, model.device)
    row["tokens/s"] = row["batch"] / row["ms"] * 1000
    for context in contexts:
        runner.settle(context)
    return row


def _all_share(runner: Runner) -> bool:
    """Whether the sequences attended to all of their prefix in the last step."""
    assert isinstance(runner, GraphRunner)
    return bool(runner._riders) and all(one.rebuilt is not None for one in runner._riders.values())


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _compare(report: Report) -> None:
    """Throughput over kernels without a graph of the same variant, and over the plain variant."""
    plain = {
        (row["variant"], row["batch"]): row["tokens/s"] for row in report.rows if row["side"] == "kernels"
    }
    first = {(row["side"], row["batch"]): row["tokens/s"] for row in report.rows if row["variant"] == "plain"}
    for row in report.rows:
        if (row["side"], row["batch"]) in first:
            row["times_plain"] = row["tokens/s"] / first[row["side"], row["batch"]]
        if (row["variant"], row["batch"]) in plain:
            row["ratio"] = row["tokens/s"] / plain[row["variant"], row["batch"]]


if __name__ == "__main__":
    main()
