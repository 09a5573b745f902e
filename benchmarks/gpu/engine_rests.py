"""The first token of prompts with much behind their prefix, of a Llama-3.1-8B-shaped model on one GPU.

python benchmarks/gpu/engine_rests.py --out benchmarks/results/gpu/engine_rests.json
python benchmarks/gpu/engine_rests.py --tiny --out engine_rests.json    # small, on a CPU: checks this script

Random weights in bfloat16, prefixes of random tokens at 8x that are in memory. `prefix`: an engine that
always goes on from the prefix. `whole`, the baseline: one that has none. `decided`: one as a server has it,
which has computed a long rest behind the prefix once. Every prompt has an engine of its own, so that no
conversation is gone on from. Seconds are medians of `--runs` prompts, after one that is not counted;
`served`: what those of `decided` used. `start_token_us`: what a server believes of a token's prefill when it
starts, and `token_us` what it believes after this row, of a token at position 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bundled import load
from compression import LLAMA_8B, TINY
from engine_decode import _model
from long_rests import Faithful
from parts import first_token
from report import Report, command

from xkv_service import CompressionSpec, SelectionSpec, compress
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import PrefixMatch
from xkv_service.engine.pool_state import PoolState
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel

_MATCH = "0" * 64


class Resident:
    """What of a `PrefixPool` an engine asks where one prefix is in memory, and stays there."""

    gone: frozenset[str] = frozenset()
    loading = False

    def __init__(self, prefix: Prefix, rates: LoadingRates) -> None:
        self._prefix, self.rates = prefix, rates

    def take(self, artifact_id: str, tokens: int, part: object = None) -> Prefix:
        """The prefix."""
        return self._prefix

    def release(self, key: str) -> None:
        """It stays."""

    def state(self) -> PoolState:
        """Nothing waits."""
        return PoolState(0, 0, 0, (_MATCH,), {}, frozenset(), frozenset(), 0, 0)


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = _arguments()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    torch.manual_seed(0)
    model = _model(TINY if arguments.tiny else LLAMA_8B, device)
    loaded = replace(load(), model=model)
    report = Report("engine_rests", command(), "whole")
    report.keep(arguments.out, model="Llama-3.1-8B shapes, random weights", runs=arguments.runs)
    for tokens in [1024] if arguments.tiny else [1024 * int(one) for one in arguments.tokens.split(",")]:
        measured = [cls.measured(model) for cls in (Faithful, LoadingRates)]
        start_us = 1e6 * measured[1].prefill_s(1)
        ids = torch.randint(3, 90, (tokens,))
        spec = CompressionSpec(ratio=2.0 if arguments.tiny else 8.0, factor_dtype="int8")
        prefix = Prefix.of(model, compress(model, ids, spec))
        ways = _ways(loaded, ids.tolist(), prefix, measured)
        rests = [16, 256, 512] if arguments.tiny else [int(one) for one in arguments.rests.split(",")]
        ways["decided"](rests[-1], 0)
        for rest in rests:
            found = {
                name: [ask(rest, 1 + run) for run in range(arguments.runs + 1)][1:]
                for name, ask in ways.items()
            }
            row = {f"{name}_s": median(one for one, _ in told) for name, told in found.items()}
            report.add(
                tokens=tokens,
                rest=rest,
                **row,
                start_token_us=start_us,
                token_us=1e6 * measured[1].figures()["prefill_token"],
                served=", ".join(name for _, name in found["decided"]),
                ratio=row["whole_s"] / row["decided_s"],
            )
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="8,64", help="thousands of tokens of a prefix, comma-separated")
    parser.add_argument("--rests", default="32,128,512,2048,8192", help="tokens behind it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: checks this script")
    return parser.parse_args()


def _ways(
    loaded: LoadedModel, ids: list[int], prefix: Prefix, measured: list[LoadingRates]
) -> dict[str, Callable[[int, int], tuple[float, str]]]:
    """By name, what asks a prompt with so many tokens behind the prefix: the seconds, and what served it."""
    settings = EngineSettings(tail_bytes=2**40, stored_tail_bytes=0, selection=SelectionSpec("sketch", 2048))
    faithful, decided = (cast("PrefixPool", Resident(prefix, rates)) for rates in measured)

    def ask(pool: PrefixPool | None, rest: int, seed: int) -> tuple[float, str]:
        other = torch.randint(3, 90, (rest,), generator=torch.Generator().manual_seed(1000 * rest + seed))
        match = None if pool is None else PrefixMatch(_MATCH, len(ids))
        with Engine(loaded, settings, pool) as engine:
            first_token(engine, (5, 6), None)  # its runner is ready then
            seconds, started = first_token(engine, (*ids, *other.tolist()), match)
        return seconds, "whole" if started.artifact_id is None else "prefix"

    pools: dict[str, Any] = {"prefix": faithful, "whole": None, "decided": decided}
    return {name: lambda rest, seed, pool=pool: ask(pool, rest, seed) for name, pool in pools.items()}


if __name__ == "__main__":
    main()
