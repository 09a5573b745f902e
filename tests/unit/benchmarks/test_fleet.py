"""The simulated fleet: its router is Ray's, and its hit rates are those of theory where theory knows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.fleet import Fleet, Ring, Simulation, lru_hit_rate, stored_share

SMALL = Fleet(replicas=10, documents=20_000, rate=1.5, answer_s=0.1, budget=20 * 10**9)
"""Answers so short that no replica is ever full."""


def hit_rate(fleet: Fleet, seed: int = 0) -> float:
    simulation = Simulation(fleet, seed)
    simulation.run(20_000)
    counts = simulation.run(20_000)
    assert counts.refused == counts.fallbacks == 0
    assert counts.hits + counts.loads == counts.served == 20_000
    return counts.hits / counts.served


@pytest.mark.parametrize("change", [{}, {"skew": 0.8}, {"skew": 1.2}, {"budget": 5 * 10**9}])
def test_hit_rates_are_those_of_ches_approximation(change: dict[str, float]) -> None:
    fleet = replace(SMALL, **change)
    assert hit_rate(fleet) == pytest.approx(lru_hit_rate(fleet), abs=0.03)


def test_a_seed_gives_one_result() -> None:
    assert Simulation(SMALL, 3).run(2_000) == Simulation(SMALL, 3).run(2_000)
    assert Simulation(SMALL, 3).run(2_000) != Simulation(SMALL, 4).run(2_000)


def test_memory_that_holds_everything_loads_each_document_once() -> None:
    fleet = replace(SMALL, documents=50, budget=10**12)
    counts = Simulation(fleet).run(5_000)
    assert counts.loads == 50 and lru_hit_rate(fleet) == 1.0
    assert counts.loaded_bytes == int(fleet.tokens(0).sum()) * fleet.token_bytes
    assert counts.seconds == pytest.approx(5_000 / 15, rel=0.05)


def test_a_document_that_all_ask_for_is_refused_where_its_replicas_are_full() -> None:
    hot = replace(
        SMALL, documents=1, answer_s=20.0, ongoing=8
    )  # 15 a second for 20 s: 300 at once, room for 80
    served = [Simulation(replace(hot, fallbacks=count)).run(20_000).served for count in (0, 2, 9)]
    rooms = [8, 24, 80]
    for count, room in zip(served, rooms, strict=True):
        assert count == pytest.approx(20_000 * room / 300, rel=0.1)


def test_a_document_that_is_held_stays_in_memory() -> None:
    """Nothing is evicted below a request: with room for one document, the second is not kept."""
    fleet = Fleet(replicas=1, documents=2, skew=0.0, answer_s=1e9, rate=1.0, shortest=1000, longest=1001,
                  budget=1500 * 16_372)  # fmt: skip
    counts = Simulation(fleet).run(10)
    assert counts.served == 10 and 0 < counts.hits < 9


def test_a_store_with_a_ttl_keeps_what_is_used_within_it() -> None:
    fleet = replace(
        SMALL, documents=5_000, ttl_s=200.0, budget=1
    )  # nothing fits: every request asks the store
    simulation = Simulation(fleet)
    simulation.run(10_000)
    counts = simulation.run(20_000)
    assert counts.hits == 0
    assert counts.loads / counts.served == pytest.approx(stored_share(fleet), abs=0.02)
    assert stored_share(replace(fleet, ttl_s=None)) == 1.0


def test_the_ring_spreads_documents_and_moves_few_when_a_replica_leaves() -> None:
    keys = [str(number) for number in range(5_000)]
    many, fewer = Ring(10, 2), Ring(9, 2)
    first = {key: many.replicas(key) for key in keys}
    assert all(len(set(ranked)) == 3 for ranked in first.values())
    shares = Counter(ranked[0] for ranked in first.values())
    assert len(shares) == 10 and max(shares.values()) < 2 * 500
    for key, ranked in first.items():
        left = [number for number in ranked if number != 9]
        assert fewer.replicas(key)[: len(left)] == left
