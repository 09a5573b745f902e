"""The partition found is the best of all."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_service.calibration.partition import partition


def every_partition(count: int, most: int, first: int = 0) -> Iterator[list[tuple[int, int]]]:
    if first == count:
        yield []
    for size in range(1, min(most, count - first) + 1):
        for rest in every_partition(count, most, first + size):
            yield [(first, size), *rest]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_no_partition_costs_less(count: int, most: int, seed: int) -> None:
    draw = random.Random(seed)
    costs = {(first, size): draw.random() for first in range(count) for size in range(1, most + 1)}
    found = partition(count, most, lambda first, size: costs[first, size])
    assert found in list(every_partition(count, most))
    cheapest = min(sum(costs[group] for group in one) for one in every_partition(count, most))
    assert abs(sum(costs[group] for group in found) - cheapest) < 1e-12


def test_groups_that_cost_nothing_together_stay_together() -> None:
    assert partition(6, 3, lambda first, size: 1.0) == [(0, 3), (3, 3)]
    assert partition(3, 4, lambda first, size: float(size > 1)) == [(0, 1), (1, 1), (2, 1)]
