"""A deployment on paper: 1,000 GPUs and 10 million documents. docs/scale.md reads the figures. No GPU.

    python benchmarks/scale.py

Three parts. The catalog is a real Redis, filled by the real `Catalog`: bytes an entry and microseconds of the
server for a lookup. The prices are arithmetic over prefill and bytes as measured on one H200 (results/
gpu_compression_h200.json). The fleet is simulated (fleet.py): a tenth of it, one thing changed at a time,
then all of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from catalog_lookup import Corpus, fill, prompts, start_redis
from fleet import Counts, Fleet, Simulation, lru_hit_rate, stored_share
from report import Report, table

from xkv_artifacts.catalog import Catalog
from xkv_artifacts.redis_link import RedisLink

RESULTS = Path(__file__).parent / "results"
FULL_BYTES = 131_072
"""Of a token in an exact cache of Llama-3.1-8B's shapes at 16 bits."""

TENTH = Fleet()
WHOLE = Fleet(replicas=1000, documents=10_000_000, fallbacks=64)

Scenario = tuple[str, Fleet]


def scenarios() -> list[Scenario]:
    """A name for each, and the fleet: a tenth of the whole with one thing changed."""
    fair = replace(TENTH, fallbacks=16)
    return [
        ("the tenth", fair),
        *((f"skew {skew:g}", replace(fair, skew=skew)) for skew in (0.6, 0.8, 0.9, 1.1, 1.2)),
        *((f"{gb} GB a replica", replace(fair, budget=gb * 10**9)) for gb in (8, 16, 32, 96)),
        *((f"{count} replicas", replace(fair, replicas=count)) for count in (25, 50, 200)),
        ("exact caches", replace(fair, token_bytes=FULL_BYTES, stored_bytes=FULL_BYTES)),
        ("20x, 11x in memory", replace(fair, token_bytes=FULL_BYTES // 11, stored_bytes=FULL_BYTES // 20)),
        *((f"{count} fallbacks", replace(TENTH, fallbacks=count)) for count in (0, 2, 4, 8)),
        *((f"TTL {ttl} s", replace(fair, ttl_s=float(ttl))) for ttl in (60, 600)),
    ]


@cache
def measured_on_gpu() -> tuple[np.ndarray[Any, Any], float]:
    """Prefill seconds of T tokens as coefficients of T² and T, and bytes a stored token, of one H200."""
    rows = json.loads((RESULTS / "gpu_compression_h200.json").read_text())["rows"]
    tokens = np.array([row["tokens"] for row in rows], float)
    per_token = np.array([row["bare_prefill_s"] for row in rows]) / tokens
    return np.polyfit(tokens, per_token, 1), max(row["bytes_per_token"] for row in rows)


def prefill_s(tokens: np.ndarray[Any, Any] | float) -> Any:
    """Seconds to prefill so many tokens, between the measured lengths and a little beyond."""
    square, linear = measured_on_gpu()[0]
    return square * np.square(tokens) + linear * np.asarray(tokens)


def prices() -> list[dict[str, Any]]:
    """By document length: recomputing a token against loading it."""
    token_bytes = measured_on_gpu()[1]
    rows = []
    for tokens in (4_096, 16_384, 32_768, 65_536, 131_072):
        seconds = float(prefill_s(tokens))
        rows.append(
            {
                "tokens": tokens,
                "prefill_s": seconds,
                "prefill_us_a_token": 1e6 * seconds / tokens,
                "stored_mb": tokens * token_bytes / 1e6,
                "load_us_a_token_at_1_gb_s": token_bytes / 1e3,
                "even_mb_s": tokens * token_bytes / seconds / 1e6,
                "even_mb_s_exact": tokens * FULL_BYTES / seconds / 1e6,
            }
        )
    return rows


def catalog(artifacts: int, lookups: int) -> dict[str, Any]:
    """Bytes of Redis an entry, and its processor time a lookup, of prefixes of 4k to 64k tokens."""
    corpus = Corpus("bench", artifacts, (TENTH.shortest, TENTH.longest))
    with tempfile.TemporaryDirectory() as folder:
        server, url = start_redis(folder)
        try:
            link = RedisLink(url)
            whole = Catalog(link, "0" * 32)
            empty = link.call(lambda client: client.info("memory"))["used_memory"]
            tokens = sum(len(corpus.document(number)) // 4 for number in range(artifacts)) / artifacts
            fill(whole, corpus)
            full = link.call(lambda client: client.info("memory"))["used_memory"]
            asked = prompts(corpus, lookups)["an artifact + 200 tokens"]
            link.call(lambda client: client.config_resetstat())
            busy = _processor_s(link)
            found = [whole.candidates("a" * 64, "bench", ids) for ids, _ in asked]
            busy = _processor_s(link) - busy
            trips = link.call(lambda client: client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        finally:
            server.terminate()
            server.wait()
    assert all(found)
    entry = (full - empty) / artifacts
    return {
        "artifacts": artifacts,
        "mean_tokens": tokens,
        "bytes_an_entry": entry,
        "gb_of_10_million": entry * 1e7 / 1e9,
        "round_trips_a_lookup": trips / len(asked),
        "redis_us_a_lookup": 1e6 * busy / len(asked),
    }


def _processor_s(link: RedisLink) -> float:
    """Processor time that Redis has taken; on a busy machine it says more than a clock does."""
    used = link.call(lambda client: client.info("cpu"))
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def row(name: str, fleet: Fleet, counts: Counts, seed: int) -> dict[str, Any]:
    """What the report says of one scenario.

    hit: of requests that were served, those that found their document in memory; lru: the same by Che's
    approximation, which knows no spilling. computed: the document was gone from the store; kept: those that
    are not, in the long run, by arithmetic. refused: every replica that the router tries was full. spilled:
    taken by another replica than the first. gpu_s_saved: prefill that one replica is spared in a second.
    """
    per_s = counts.loaded_bytes / counts.seconds
    tokens = fleet.tokens(seed)
    spared = counts.cached_tokens / counts.prompt_tokens * fleet.rate
    return {
        "scenario": name,
        "hit_%": 100 * counts.hits / counts.served,
        "lru_%": 100 * lru_hit_rate(fleet, seed),
        "computed_%": 100 * counts.computed / counts.served,
        "kept_%": 100 * stored_share(fleet),
        "refused_%": 100 * counts.refused / (counts.served + counts.refused),
        "spilled_%": 100 * counts.fallbacks / counts.served,
        "store_gb_s": per_s / 1e9,
        "replica_mb_s": per_s / fleet.replicas / 1e6,
        "store_tb": float(tokens.sum()) * fleet.stored_bytes / 1e12,
        "gpu_s_saved": spared * float(prefill_s(tokens.astype(float)).mean()),
    }


def simulate(report: Report, options: argparse.Namespace) -> None:
    """Every scenario from empty memory: half of the requests to fill it, the other half counted."""
    chosen = [(name, fleet, options.requests) for name, fleet in scenarios()]
    if not options.tenth:
        chosen += [("1,000 GPUs, 10 million documents", WHOLE, 5 * options.requests)]
        chosen += [("the same, 2 fallbacks", replace(WHOLE, fallbacks=2), 5 * options.requests)]
    for name, fleet, requests in chosen:
        simulation = Simulation(fleet, options.seed)
        simulation.run(requests)
        report.add(**row(name, fleet, simulation.run(requests), options.seed))


def main() -> None:
    parser = argparse.ArgumentParser(description="Catalog, prices and hit rates of a large deployment.")
    parser.add_argument(
        "--requests", type=int, default=100_000, help="of a tenth of the fleet, after as many"
    )
    parser.add_argument("--artifacts", type=int, default=20_000, help="in the catalog that is measured")
    parser.add_argument("--tenth", action="store_true", help="leave the whole fleet out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    command = f"python benchmarks/scale.py --seed {options.seed}{' --tenth' if options.tenth else ''}"
    report = Report("scale", command, "the row of exact caches; arithmetic is over gpu_compression_h200.json")
    catalogued, priced = catalog(options.artifacts, options.artifacts // 20), prices()
    print(table([catalogued]), table(priced), sep="\n\n", flush=True)
    simulate(report, options)
    report.write(options.out, catalog=catalogued, prices=priced, requests=options.requests)


if __name__ == "__main__":
    main()
