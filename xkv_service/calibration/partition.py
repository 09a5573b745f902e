"""Which neighbours share token factors: the contiguous partition of least cost, by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable


def partition(count: int, most: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut `count` layers into groups of at most `most` neighbours.

    Args:
        cost: of the group of (first layer, how many); groups add up.

    Returns:
        (first layer, how many) of each group, in order.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, count + 1):
        sizes = range(1, min(most, end) + 1)
        best.append(min((best[end - size][0] + cost(end - size, size), size) for size in sizes))
    groups: list[tuple[int, int]] = []
    end = count
    while end:
        size = best[end][1]
        groups.append((end - size, size))
        end -= size
    return groups[::-1]
