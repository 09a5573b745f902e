"""`Metrics`: what Prometheus reads at /metrics. Engines' own figures are asked for when it does."""

from __future__ import annotations

import re
from collections import Counter as Counts
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from xkv_service.api.engine_counters import ENGINE_COUNTERS, REMAKES
from xkv_service.engine.messages import EngineState, MissReason

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Up to what a request may take by default."""
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LOST = (
    ("xkv_verification_failures", "corrupt", "prefixes_damaged", "Times that damage was found"),
    ("xkv_missing_blobs", "missing", "prefixes_missing", "Times that a blob was found missing"),
)
_NAME = re.compile(r"[^a-zA-Z0-9_]")


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"xkv_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"xkv_{name}_seconds", text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"xkv_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests by route and status", "route", "status")
        self.first_token = histogram(
            "time_to_first_token", "From when a request's body was read to its first token", _TTFT_S
        )
        self.token_gap = histogram("inter_token", "Between tokens of an answer", _GAP_S)
        self.queued = histogram(
            "queue", "From submission until a prompt is begun, for a replica too", _TTFT_S
        )
        self.queue_timeouts = counter(
            "queue_timeouts", "Requests that waited too long to be begun, for a replica too"
        )
        self.loading = histogram("load", "Spent waiting for factors, of requests that did", _TTFT_S)
        self.lookup = histogram("lookup", "Until the catalog answered", _GAP_S)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens not computed, by where from", "source")
        self.computed_tokens = counter("computed_tokens", "Prompt tokens computed")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers")
        self.hits = counter("prefix_hits", "Answers from an artifact's factors")
        self.misses = counter("prefix_misses", "Answers without an artifact, or not as far", "reason")
        for reason in get_args(MissReason):
            self.misses.labels(reason)
        self.sessions = gauge("sessions", "Requests running and waiting, kept tails", "state")
        self.resident_bytes = gauge("resident_bytes", "Bytes on the engines' devices", "kind")
        self.stored_tail_bytes = gauge("stored_tail_bytes", "Bytes of tails in the store, as heard last")
        self.resident_prefixes = gauge("resident_prefixes", "Artifacts on the engines' devices")
        self.engines = gauge("engines", "Engines that answered")
        self.lost_at_lookup: Counts[str] = Counts()
        self._states: Sequence[EngineState] = ()
        self._lookups: Mapping[str, float] = {}
        registry.register(self)

    def exposition(
        self, states: Sequence[EngineState], lookups: Mapping[str, float] | None = None, waiting: int = 0
    ) -> bytes:
        """The text that Prometheus reads, with what the engines, and lookups here, say now.

        Args:
            waiting: requests that no engine has got yet.
        """
        self._states, self._lookups = states, lookups or {}
        for name, values in (
            ("running", [state.running for state in states]),
            ("waiting", [waiting, *(state.waiting for state in states)]),
            ("kept", [state.kept_tails for state in states]),
        ):
            self.sessions.labels(name).set(sum(values))
        self.resident_bytes.labels("prefixes").set(sum(state.prefix_bytes for state in states))
        self.resident_bytes.labels("running").set(sum(state.running_bytes for state in states))
        self.resident_bytes.labels("rebuilt").set(sum(state.rebuilt_bytes for state in states))
        self.resident_bytes.labels("tails").set(sum(state.tail_bytes for state in states))
        self.stored_tail_bytes.set(max((state.stored_tail_bytes for state in states), default=0))
        self.resident_prefixes.set(len({name for state in states for name in state.prefixes}))
        self.engines.set(len(states))
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """The engines' own counters, added up, and those of lookups; lost blobs are found by both. And what
        the engines believe it costs to load and to prefill. While no engine is known there are none of
        theirs: to Prometheus a counter that falls began anew."""
        for name, reason, counter, text in _LOST if self._states else ():
            value = self.lost_at_lookup[reason] + sum(one.counters.get(counter, 0.0) for one in self._states)
            yield CounterMetricFamily(name, text, value=value)
        costs = GaugeMetricFamily(
            "xkv_cost_seconds",
            "What engines believe it costs, their mean",
            labels=["of"],
        )
        for name in sorted({name for state in self._states for name in state.rates}):
            costs.add_metric([name], mean(s.rates[name] for s in self._states if name in s.rates))
        yield costs
        yield from _counters("engine", ENGINE_COUNTERS, [state.counters for state in self._states])
        yield from _counters("lookup", REMAKES, [self._lookups])


def _counters(
    of: str, texts: Mapping[str, str], found: Sequence[Mapping[str, float]]
) -> Iterable[CounterMetricFamily]:
    """Counters added up, those too that have counted nothing yet; none while nobody tells of any."""
    for name in sorted({*texts, *(name for one in found for name in one)}) if found else ():
        total = sum(one.get(name, 0.0) for one in found)
        text = texts.get(name, f"Counter {name} of the {of}")
        yield CounterMetricFamily(f"xkv_{of}_{_NAME.sub('_', name)}", text, value=total)
