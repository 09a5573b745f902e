"""The first token of prompts with much behind their prefix: from the prefix, computed whole, as decided.

    python benchmarks/long_rests.py --out benchmarks/results/long_rests.json

The bundled model, one CPU thread, one document whose artifact is in memory, and other text behind it, another
one for every prompt. `prefix`: an engine that always goes on from the artifact. `whole`, the baseline: one
that has none. `decided`: one as a server has it, which has computed a long rest behind factors once. Seconds
are medians of `--runs` prompts; `served`: what the last engine used, prompt by prompt.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch
from bundled import document_ids, load
from loading import publish_factors, stored_calibration
from parts import first_token
from report import Report, command

from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.choice import best_spec
from xkv_service.compression import compress_each
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.modeling.models import LoadedModel


class Faithful(LoadingRates):
    """A prefix is used whatever stands behind it."""

    def everything_is_faster(self, prefix: int, tokens: int, held: int) -> bool:
        """Never."""
        return False


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long_rests.json"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rests", type=int, nargs="+", default=[16, 128, 256, 512, 1024, 2048])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load()
    report = Report("long_rests", command(), "whole")
    with tempfile.TemporaryDirectory() as folder, ArtifactStore.open(folder) as store:
        ids = document_ids(loaded, arguments.tokens, seed=0).tolist()
        calibration = stored_calibration(store)
        (factors,) = compress_each(loaded.model, ids, [best_spec(8.0, calibration)], calibration)
        match = PrefixMatch(publish_factors(store, loaded.identity, factors), len(ids))
        faithful = PrefixPool(
            loaded.model, store, budget_bytes=1 << 30, rates=Faithful.measured(loaded.model)
        )
        decided = PrefixPool(loaded.model, store, budget_bytes=1 << 30)
        _Asked(loaded, decided, ids, match).about(max(arguments.rests), seed=1)
        ways = {
            "prefix": _Asked(loaded, faithful, ids, match),
            "whole": _Asked(loaded, None, ids, None),
            "decided": _Asked(loaded, decided, ids, match),
        }
        for rest in arguments.rests:
            found = {
                name: [asked.about(rest, seed=2 + run) for run in range(arguments.runs)]
                for name, asked in ways.items()
            }
            seconds = {f"{name}_s": median(one for one, _ in told) for name, told in found.items()}
            served = ", ".join(name for _, name in found["decided"])
            report.add(rest=rest, **seconds, served=served, ratio=seconds["whole_s"] / seconds["decided_s"])
        faithful.close()
        decided.close()
    report.write(arguments.out, note="float32, 8x", tokens=arguments.tokens, runs=arguments.runs)


class _Asked:
    """An engine of its own for every prompt: no conversation is gone on from."""

    def __init__(
        self, loaded: LoadedModel, pool: PrefixPool | None, ids: list[int], match: PrefixMatch | None
    ) -> None:
        self._loaded, self._pool, self._ids, self._match = loaded, pool, ids, match

    def about(self, rest: int, seed: int) -> tuple[float, str]:
        """Seconds to the first token behind `rest` other tokens, and what served it."""
        other = document_ids(self._loaded, rest, seed=100 * rest + seed).tolist()[:rest]
        with Engine(self._loaded, prefixes=self._pool) as engine:
            seconds, started = first_token(engine, (*self._ids, *other), self._match)
        return seconds, "whole" if started.artifact_id is None else "prefix"


if __name__ == "__main__":
    main()
