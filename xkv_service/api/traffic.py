"""`Traffic`: how requests went, counted for Prometheus, and by namespace for the status page."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xkv_service.api.metrics import Metrics

if TYPE_CHECKING:
    from xkv_service.api.generation import Outcome

RATE_WINDOW_S = 60.0
"""Tokens per second are those of the last minute."""


@dataclass
class NamespaceTraffic:
    """What one namespace asked for since the server's start."""

    requests: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    misses: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    recent: deque[tuple[float, int]] = field(default_factory=deque)  # when an answer ended, its tokens

    def generated(self, tokens: int) -> None:
        """An answer of so many tokens ended."""
        self.generated_tokens += tokens
        self.recent.append((time.monotonic(), tokens))
        self._forget_old()

    def tokens_per_second(self) -> float:
        """Tokens of answers that ended in the last minute, a second."""
        self._forget_old()
        return sum(tokens for _, tokens in self.recent) / RATE_WINDOW_S

    def _forget_old(self) -> None:
        since = time.monotonic() - RATE_WINDOW_S
        while self.recent and self.recent[0][0] < since:
            self.recent.popleft()


class Traffic:
    """Takes in outcomes.

    Args:
        metrics: counts them for Prometheus.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.namespaces: dict[str, NamespaceTraffic] = defaultdict(NamespaceTraffic)

    def add(self, namespace: str, outcome: Outcome) -> None:
        """One request ended."""
        here, metrics = self.namespaces[namespace], self._metrics
        here.requests += 1
        here.generated(outcome.generated)
        metrics.generated_tokens.inc(outcome.generated)
        for gap in outcome.gaps_s:
            metrics.token_gap.observe(gap)
        metrics.queue_timeouts.inc(outcome.failed == "queue_timeout")
        started = outcome.started
        if started is None or outcome.first_token_s is None:
            return
        here.prompt_tokens += started.prompt_tokens
        here.cached_tokens += started.cached_tokens
        metrics.first_token.observe(outcome.first_token_s)
        metrics.queued.observe(started.queued_seconds)
        if started.load_seconds:
            metrics.loading.observe(started.load_seconds)
        metrics.prompt_tokens.inc(started.prompt_tokens)
        metrics.cached_tokens.labels("prefix").inc(started.prefix_tokens)
        metrics.cached_tokens.labels("tail").inc(started.tail_tokens)
        metrics.computed_tokens.inc(max(0, started.prompt_tokens - started.cached_tokens))
        if started.artifact_id is not None:
            here.hits += 1
            metrics.hits.inc()
        if started.miss is not None:
            here.misses[started.miss.reason] += 1
            metrics.misses.labels(started.miss.reason).inc()
