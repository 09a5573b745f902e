"""A fleet on paper: which replica a request goes to, what it has in memory, and what has to be loaded.

Where a request goes is decided by Ray's own consistent-hash router, and what leaves a replica's memory by the
engine's own `Residents`. Made up are the requests, their documents and the clock.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.experimental.consistent_hash_router import (
    DEFAULT_NUM_VIRTUAL_NODES,
    ConsistentHashRouter,
)

from xkv_service.engine.residents import Residents


@dataclass(frozen=True)
class Fleet:
    """What is simulated.

    Args:
        replicas: one a GPU. documents: all compressed, the n-th most popular asked for in proportion to
            n to the power of -`skew`; their tokens log-uniform between `shortest` and `longest`.
        rate: requests a second of each replica on average, with exponential gaps.
        answer_s: mean time that a request holds its document, exponential. ongoing: requests that a replica
            takes at once. fallbacks: further replicas that are tried when it is full.
        budget: bytes of each replica for documents. token_bytes: of a token, stored and in memory.
        ttl_s: an artifact that nobody used for so long is gone from the store, and made again at the next
            request; None: never.
    """

    replicas: int = 100
    documents: int = 1_000_000
    skew: float = 1.0
    shortest: int = 4_096
    longest: int = 65_536
    rate: float = 1.5
    answer_s: float = 10.0
    ongoing: int = 32
    fallbacks: int = 2
    budget: int = 64 * 10**9
    token_bytes: int = 16_372
    ttl_s: float | None = None

    def probabilities(self) -> NDArray[np.float64]:
        """Of each document, the most popular first; they add up to 1."""
        weights = np.arange(1, self.documents + 1, dtype=np.float64) ** -self.skew
        total: NDArray[np.float64] = weights / weights.sum()
        return total

    def tokens(self, seed: int) -> NDArray[np.int64]:
        """Of each document."""
        low, high = np.log(self.shortest), np.log(self.longest)
        return np.exp(np.random.default_rng(seed).uniform(low, high, self.documents)).astype(np.int64)


@dataclass
class Counts:
    """What became of the requests.

    Args:
        hits: found their document in memory. loads: had it loaded. computed: it was gone from the store.
        refused: all replicas that the router tries were full. fallbacks: taken by another than the first.
        loaded_bytes: read from the store. prompt_tokens, cached_tokens: of documents; cached are those that
            were not computed.
        seconds: simulated.
    """

    hits: int = 0
    loads: int = 0
    computed: int = 0
    refused: int = 0
    fallbacks: int = 0
    loaded_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0

    @property
    def served(self) -> int:
        """Requests that were not refused."""
        return self.hits + self.loads + self.computed


class Ring:
    """The replicas that Ray's router tries for a key, in order. Built without a cluster.

    Args:
        replicas: how many. fallbacks: tried after the first.
    """

    def __init__(self, replicas: int, fallbacks: int) -> None:
        deployment = DeploymentID("engine", "xkv")
        ids = [ReplicaID(f"replica-{number}", deployment) for number in range(replicas)]
        self._numbers = {name: number for number, name in enumerate(ids)}
        self._router: Any = object.__new__(ConsistentHashRouter)
        self._router._deployment_id = deployment
        self._router._num_virtual_nodes = DEFAULT_NUM_VIRTUAL_NODES
        self._router._num_fallback_replicas = fallbacks
        self._router._rebuild_ring(frozenset(ids))

    def replicas(self, key: str) -> list[int]:
        """Numbers of the replicas for a key."""
        return [self._numbers[name] for name in self._router._lookup_ranked_replicas(key)]


class Replica:
    """One replica's memory, and the requests that it is answering.

    Args:
        budget: bytes. ongoing: requests at once.
    """

    def __init__(self, budget: int, ongoing: int) -> None:
        self._residents = Residents(budget)
        self._ongoing = ongoing
        self._running: list[tuple[float, str | None]] = []

    def is_full(self, now: float) -> bool:
        """Whether it takes no more requests, those that have ended by now left out."""
        while self._running and self._running[0][0] <= now:
            key = heapq.heappop(self._running)[1]
            if key is not None:
                self._residents.release(key)
        return len(self._running) >= self._ongoing

    def take(self, key: str, nbytes: int, end: float) -> bool:
        """Begin a request that ends at `end`; whether its document is in memory already."""
        hit = self._residents.get(key) is not None
        kept = hit or self._residents.put(key, True, nbytes)
        if kept:
            self._residents.hold(key)
        heapq.heappush(self._running, (end, key if kept else None))
        return hit


class Simulation:
    """One fleet under its traffic, from empty memory on.

    Args:
        seed: of documents, requests and times.
    """

    def __init__(self, fleet: Fleet, seed: int = 0) -> None:
        self.fleet = fleet
        self._random = np.random.default_rng(seed + 1)
        self._shares = np.cumsum(fleet.probabilities())
        self._tokens = fleet.tokens(seed)
        self._ring = Ring(fleet.replicas, fleet.fallbacks)
        self._ranked: dict[int, list[int]] = {}
        self._fleet = [Replica(fleet.budget, fleet.ongoing) for _ in range(fleet.replicas)]
        self._used: dict[int, float] = {}
        self._now = 0.0

    def run(self, requests: int) -> Counts:
        """Go on for some requests; what became of these."""
        fleet, counts, begin = self.fleet, Counts(), self._now
        documents = np.searchsorted(self._shares, self._random.random(requests))
        gaps = self._random.exponential(1 / (fleet.rate * fleet.replicas), requests)
        lasting = self._random.exponential(fleet.answer_s, requests)
        drawn = zip(documents.tolist(), gaps.tolist(), lasting.tolist(), strict=True)
        for document, gap, answer_s in drawn:
            self._now += gap
            self._request(min(document, fleet.documents - 1), answer_s, counts)
        counts.seconds = self._now - begin
        return counts

    def _request(self, document: int, answer_s: float, counts: Counts) -> None:
        tokens = int(self._tokens[document])
        counts.prompt_tokens += tokens
        key = str(document)
        ranked = self._ranked.get(document)
        if ranked is None:
            ranked = self._ranked[document] = self._ring.replicas(key)
        place = next(
            (at for at, number in enumerate(ranked) if not self._fleet[number].is_full(self._now)), None
        )
        if place is None:
            counts.refused += 1
            return
        counts.fallbacks += place > 0
        nbytes = tokens * self.fleet.token_bytes
        stored = self._is_stored(document)
        if self._fleet[ranked[place]].take(key, nbytes, self._now + answer_s):
            counts.hits += 1
        elif stored:
            counts.loads += 1
            counts.loaded_bytes += nbytes
        else:
            counts.computed += 1
            return
        counts.cached_tokens += tokens

    def _is_stored(self, document: int) -> bool:
        """Whether the store still has it; from now on it does."""
        if self.fleet.ttl_s is None:
            return True
        used = self._used.get(document)
        self._used[document] = self._now
        return used is not None and self._now - used <= self.fleet.ttl_s


def lru_hit_rate(fleet: Fleet, seed: int = 0) -> float:
    """The hit rate without overflow by Che's approximation (Che, Tung, Wang 2002): an independent check.

    Each replica is a cache of its own with a share of the documents. All have about the same characteristic
    time t, after which an unused document has left: the one at which the expected bytes fill the budget.
    """
    rates = fleet.probabilities() * fleet.rate * fleet.replicas
    sizes = fleet.tokens(seed) * float(fleet.token_bytes)
    total = float(fleet.budget) * fleet.replicas
    if sizes.sum() <= total:
        return 1.0
    low, high = 0.0, 1.0
    while np.sum(sizes * -np.expm1(-rates * high)) < total:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if np.sum(sizes * -np.expm1(-rates * middle)) < total:
            low = middle
        else:
            high = middle
    return float(np.sum(rates * -np.expm1(-rates * low)) / rates.sum())


def stored_share(fleet: Fleet) -> float:
    """Of requests, those whose document was used within the TTL before: what a store with a TTL can serve."""
    if fleet.ttl_s is None:
        return 1.0
    shares = fleet.probabilities()
    return float(np.sum(shares * -np.expm1(-shares * fleet.rate * fleet.replicas * fleet.ttl_s)))
