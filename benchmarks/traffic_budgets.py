"""When a server's budgets for prefixes and conversations were full: before that, its memory has to grow."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

EVERY_S = 5.0
BUDGETS = {
    "prefix_memory": 'xkv_resident_bytes{kind="prefixes"}',
    "tail_memory": 'xkv_resident_bytes{kind="tails"}',
    "stored_tails": "xkv_stored_tail_bytes",
}
"""By option of the server, the metric of what it holds of it."""
FULL = 0.9
"""Of the most that was ever held: what is held lies below the budget by up to one prefix or conversation."""
Held = tuple[float, float]
"""Seconds since the start, bytes."""


class BudgetWatch:
    """Reads on a thread what a server holds of its budgets, until `end`.

    Args:
        url: of the server, whose /metrics needs no key.
    """

    def __init__(self, url: str) -> None:
        self._url, self._began = url, time.monotonic()
        self._held: defaultdict[str, list[Held]] = defaultdict(list)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, list[Held]]:
        """What was held, by budget."""
        self._ending.set()
        self._thread.join()
        return dict(self._held)

    def _watch(self) -> None:
        while not self._ending.wait(EVERY_S):
            at = time.monotonic() - self._began
            try:
                told = metrics(self._url)
            except OSError:  # it is being replaced, or busy
                continue
            for budget, name in BUDGETS.items():
                if name in told:
                    self._held[budget].append((at, told[name]))


def metrics(url: str) -> dict[str, float]:
    """What a server's /metrics says, by name with labels.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def filled(held: Mapping[str, Sequence[Held]], budgets: Mapping[str, str]) -> list[dict[str, Any]]:
    """Per budget: what it was, the most bytes that were held of it, and the second at which `FULL` of these
    was reached; one that is still filling gets there late.

    Args:
        held: as `BudgetWatch.end`. budgets: as the server was told, by option.
    """
    rows = []
    for budget, seen in held.items():
        most = max(size for _, size in seen)
        at = next((at for at, size in seen if size >= FULL * most), 0.0) if most else None
        rows.append({"budget": budget, "of": budgets[budget], "most_bytes": most, "full_s": at})
    return rows
