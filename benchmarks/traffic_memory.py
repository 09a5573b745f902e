"""What a server's processes hold while it has users: sampled, and how fast it grows."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import linear_regression, median, stdev
from typing import Any

import psutil

EVERY_S = 5.0
PARTS = {"xkv:engine": "engine", "xkv:ingress": "ingress", "xkv:compressor": "compressor"}
"""What a process's command line holds, and what the process is called here. Others are left out."""
Sample = tuple[float, float, float]
"""Seconds since the start, resident MiB, unique MiB."""
Samples = dict[str, list[Sample]]
"""Per part, of its largest process."""
_MIB = 2**20


class MemoryWatch:
    """Samples each process's resident and unique bytes on a thread, until `end`.

    Args:
        server: the process whose children are watched.
    """

    def __init__(self, server: int) -> None:
        self._server, self._began = server, time.monotonic()
        self._samples: defaultdict[str, list[Sample]] = defaultdict(list)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> Samples:
        """What was seen."""
        self._ending.set()
        self._thread.join()
        return dict(self._samples)

    def _watch(self) -> None:
        while not self._ending.wait(EVERY_S):
            at = time.monotonic() - self._began
            found: dict[str, list[tuple[float, float]]] = {}
            for process in _children(self._server):
                try:
                    words = " ".join(process.cmdline())
                    for mark, part in PARTS.items():
                        if mark in words:
                            held = process.memory_full_info()
                            found.setdefault(part, []).append((held.rss / _MIB, held.uss / _MIB))
                except psutil.Error:  # it ended
                    continue
            for part, held in found.items():
                self._samples[part].append((at, *max(held)))


def _children(server: int) -> list[psutil.Process]:
    try:
        return psutil.Process(server).children(recursive=True)
    except psutil.Error:
        return []


def early_and_late(samples: Sequence[Sample]) -> dict[str, float]:
    """Resident MiB: medians of the second quarter of the time and of the last."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    return {"mib_early": median(one[1] for one in early), "mib_late": median(one[1] for one in late)}


def growth(samples: Mapping[str, Sequence[Sample]], full_s: float = 0.0) -> list[dict[str, Any]]:
    """Per part: a straight line through the unique MiB of the second half of the time.

    Args:
        full_s: the second at which what the server may hold was full.

    Returns:
        MiB a minute, its standard error (samples taken as independent), what it held in the middle and at the
        end of the time, and the median of each third of what came after `full_s`.
    """
    rows = []
    for part, all_of_them in samples.items():
        half = all_of_them[len(all_of_them) // 2 :]
        full = [one for one in all_of_them if one[0] >= full_s]
        if len(half) < 3 or len(full) < 3:
            continue
        minutes, held = [one[0] / 60 for one in half], [one[2] for one in half]
        slope, start = linear_regression(minutes, held)
        left = [value - start - slope * minute for minute, value in zip(minutes, held, strict=True)]
        spread = stdev(minutes) * (len(half) - 1) ** 0.5
        rows.append(
            {
                "part": part,
                "mib_middle": held[0],
                "mib_end": held[-1],
                "mib_most": max(one[2] for one in all_of_them),
                **_thirds(full),
                "mib_a_minute": slope,
                "error": stdev(left) / spread,
            }
        )
    return rows


def _thirds(samples: Sequence[Sample]) -> dict[str, float]:
    """Unique MiB, the median of each third of the samples: where nothing leaks, the last is as the first."""
    ends = [len(samples) * third // 3 for third in range(4)]
    names = ("mib_first_third", "mib_second_third", "mib_last_third")
    return {
        name: median(one[2] for one in samples[start:end])
        for name, start, end in zip(names, ends[:-1], ends[1:], strict=True)
    }


def by_minute(samples: Samples) -> dict[str, list[int]]:
    """Per part: unique MiB, the median of each minute."""
    minutes: dict[str, defaultdict[int, list[float]]] = {part: defaultdict(list) for part in samples}
    for part, seen in samples.items():
        for at, _, unique in seen:
            minutes[part][int(at // 60)].append(unique)
    return {part: [round(median(held)) for held in found.values()] for part, found in minutes.items()}
