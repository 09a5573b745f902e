"""A prefill is timed on the clock, and beside loads by what it takes of a processor."""

from __future__ import annotations

import time

import torch

from xkv_service.engine.prefill_clock import PrefillClock

CPU = torch.device("cpu")
SLEPT_S = 0.2


def work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def timed(clock: PrefillClock, *, beside_loads: bool, slept_s: float = SLEPT_S) -> float:
    clock.begin()
    work(0.02)
    time.sleep(slept_s)
    return clock.seconds(beside_loads=beside_loads)


def test_without_loads_it_is_timed_on_the_clock() -> None:
    assert timed(PrefillClock(CPU), beside_loads=False) > SLEPT_S


def test_beside_loads_by_the_threads_own_time() -> None:
    assert 0.02 <= timed(PrefillClock(CPU), beside_loads=True) < SLEPT_S / 2


def test_what_always_takes_the_cores_counts_beside_loads_too() -> None:
    """Other programs, or a container's limit: one prefill that waited far longer changes nothing."""
    clock = PrefillClock(CPU)
    for slept_s in (SLEPT_S, 10 * SLEPT_S, SLEPT_S):
        timed(clock, beside_loads=False, slept_s=slept_s)
    assert SLEPT_S / 2 < timed(clock, beside_loads=True, slept_s=0.0) < 3 * SLEPT_S


def test_each_prefill_begins_anew() -> None:
    clock = PrefillClock(CPU)
    work(SLEPT_S)
    assert timed(clock, beside_loads=True) < SLEPT_S / 2
