"""What a `PrefixPool` holds and does, for /metrics and the status page."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PoolState:
    """A pool at one moment.

    Args:
        nbytes: resident, calibrations included. reserved: for loads that run. budget: of both. In bytes.
        prefixes: resident artifacts that are to be had, least recently used first, parts left out. holds: by
            artifact, or by `resident_key` of a part, how often it is in use.
        pins: those of the artifacts here or on their way that are pinned. staying: those of them that leave
            for none of the loads that wait for room.
        loading: loads that run or wait for a thread. parked: loads that wait for room.
        counters: since the start: hits, loads, part_loads (of the loads), load_seconds, loaded_bytes,
            evictions, pinned_evictions, and failed_ with each reason, once for each request that was told of
            it; failed loads that nobody waited for count once.
    """

    nbytes: int
    reserved: int
    budget: int
    prefixes: tuple[str, ...]
    holds: dict[str, int]
    pins: frozenset[str]
    staying: frozenset[str]
    loading: int
    parked: int
    counters: dict[str, float] = field(default_factory=dict)
