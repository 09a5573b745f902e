"""How long prompts wait where loads take about as long as computing: a simulation of `LoadingRates`.

    python benchmarks/load_or_compute.py --out benchmarks/results/load_or_compute.json

Prompts come one after the other, each with a stored prefix that nobody has in memory; computing it takes one
second, loading it so many at the median, spread log-normally. A load that nobody waits for goes on, and is
seen, and takes as long as one that is waited for, which on a busy machine it does not. One that is waited for
in vain costs the second's wait and then the second of computing, and ends before the next prompt. Seconds a
prompt, means of `--runs` runs of `--prompts` prompts. `known`: loads whose time is known in advance, which
nothing can beat. `line`, the baseline: the load is waited for if the line through the last 32 says that it
is faster. `last 8` and so on: if it is expected to be, should it be as far from the line as one of so many
last ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import mean

from report import Report, command

from xkv_service.engine import loading_rates
from xkv_service.engine.loading_rates import LoadingRates, Way

TOKENS, SIZES = 1000, (2_000_000, 3_000_000, 3_100_000)
WINDOWS = (1, 2, 4, 8, 16, 32)


class ByLine(LoadingRates):
    """What is believed of a load is believed exactly."""

    def decide(self, tokens: int, nbytes: int | None = None, rounds: int = 1) -> Way:
        """By the line alone."""
        assert nbytes is not None
        return "load" if self.load_s(nbytes) <= self.prefill_s(tokens) else "prefill"


Medians = Callable[[int, int, Random], float]
"""Of a prompt's number, of how many, and what is drawn: the median seconds of its load."""


def _constant(seconds: float) -> Medians:
    return lambda number, prompts, random: seconds


def _becomes_slow(number: int, prompts: int, random: Random) -> float:
    return 1.5 if prompts // 3 <= number < 2 * prompts // 3 else 0.3


def _sometimes(share: float) -> Medians:
    return lambda number, prompts, random: 3.0 if random.random() < share else 0.3


STORES: dict[str, Medians] = {
    **{f"{seconds}": _constant(seconds) for seconds in (0.3, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5)},
    "0.3, then 1.5, then 0.3": _becomes_slow,
    "0.3, one in ten 3": _sometimes(0.1),
    "0.3, three in ten 3": _sometimes(0.3),
}


def main() -> None:
    """Simulate, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/load_or_compute.json"))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--runs", type=int, default=40)
    arguments = parser.parse_args()
    report = Report("load_or_compute", command(), "line")
    for store, medians in STORES.items():
        for spread in (0.05, 0.15, 0.3):
            times = [
                _times(medians, spread, arguments.prompts, Random(f"{store} {run}"))
                for run in range(arguments.runs)
            ]
            line = mean(_waited(ByLine(1 / TOKENS), one) for one in times)
            found = {f"last {window}": _of_window(window, times) for window in WINDOWS}
            report.add(
                load_s=store,
                spread=spread,
                known=mean(min(1.0, seconds) for one in times for _, seconds in one),
                line=line,
                **found,
                ratio=found[f"last {loading_rates._RECENT}"] / line,
            )
    report.write(
        arguments.out, note="a simulation: no machine's times", prompts=arguments.prompts, runs=arguments.runs
    )


def _times(medians: Medians, spread: float, prompts: int, random: Random) -> list[tuple[int, float]]:
    """Bytes and seconds of each prompt's load."""
    return [
        (random.choice(SIZES), medians(number, prompts, random) * random.lognormvariate(0, spread))
        for number in range(prompts)
    ]


def _of_window(window: int, times: list[list[tuple[int, float]]]) -> float:
    before, loading_rates._RECENT = loading_rates._RECENT, window
    try:
        return mean(_waited(LoadingRates(1 / TOKENS), one) for one in times)
    finally:
        loading_rates._RECENT = before


def _waited(rates: LoadingRates, times: list[tuple[int, float]]) -> float:
    """Seconds a prompt."""
    waits = []
    for nbytes, seconds in times:
        if rates.decide(TOKENS, nbytes) == "prefill":
            waits.append(1.0)
            rates.loaded(nbytes, TOKENS, seconds)
        else:
            late = seconds > 1.0
            waits.append(2.0 if late else seconds)
            if late:
                rates.waited_in_vain()
            rates.loaded(nbytes, TOKENS, seconds, noted=late)
    return mean(waits)


if __name__ == "__main__":
    main()
