"""What can be seen of a server: metrics, logs, and the status page's figures."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from engines import PacedBackend, wait_until
from prometheus_client.parser import text_string_to_metric_families
from rivers import DOCUMENT
from serving import Served

from xkv_artifacts.manifest import PrefixManifest
from xkv_service.api.engine_counters import ENGINE_COUNTERS, REMAKES
from xkv_service.api.matching import Found, PrefixFinder
from xkv_service.api.misses import NO_ARTIFACT
from xkv_service.engine.messages import MissReason

QUESTION = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere does it end?"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 5}
OTHER: dict[str, Any] = {**CHAT, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as client:
        yield client


def metrics(http: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_counters_are_there_before_they_count_and_say_what(http: httpx.Client) -> None:
    """Those of the engine as it is, and of every reason and end that it knows."""
    http.post("/v1/chat/completions", json=CHAT)
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    told = {name: one.documentation for name, one in families.items()}
    assert told.items() >= {(f"xkv_lookup_{name}", text) for name, text in REMAKES.items()}
    engines = {f"xkv_engine_{name}": text for name, text in ENGINE_COUNTERS.items()}
    assert engines == {name: text for name, text in told.items() if name.startswith("xkv_engine_")}
    assert families["xkv_engine_ended_timeout"].samples[0].value == 0
    reasons = {sample.labels["reason"] for sample in families["xkv_prefix_misses"].samples}
    assert reasons == set(get_args(MissReason))
    buckets = {sample.labels.get("le") for sample in families["xkv_time_to_first_token_seconds"].samples}
    assert "600.0" in buckets, "a request may take so long"


def test_metrics_count_what_happened(http: httpx.Client, stored: PrefixManifest) -> None:
    before = metrics(http)
    hit = http.post("/v1/chat/completions", json=CHAT).json()
    miss = http.post("/v1/chat/completions", json={**OTHER, "stream": True})
    assert miss.headers["x-xkv-miss"] == "no_artifact"
    http.post("/v1/chat/completions", json={**CHAT, "n": 2})
    http.get("/some/path/nobody/knows")
    chat = "/v1/chat/completions"
    after = metrics(http)

    def grown(name: str, *labels: str) -> float:
        return after.get((name, labels), 0.0) - before.get((name, labels), 0.0)

    def counted() -> bool:
        nonlocal after
        after = metrics(http)
        ends = ((chat, "200", 2), (chat, "400", 1), ("other", "404", 1))
        all_told = all(grown("xkv_requests_total", route, status) == count for route, status, count in ends)
        return all_told and after["xkv_sessions", ("running",)] == 0

    wait_until(counted)
    assert grown("xkv_prefix_hits_total") == 1
    assert grown("xkv_prefix_misses_total", "no_artifact") == 1
    assert grown("xkv_cached_tokens_total", "prefix") == stored.tokens
    prompts = grown("xkv_prompt_tokens_total")
    cached = sum(grown("xkv_cached_tokens_total", source) for source in ("prefix", "tail"))
    assert grown("xkv_computed_tokens_total") == prompts - cached > 0
    assert cached >= hit["usage"]["prompt_tokens_details"]["cached_tokens"]
    answered = grown("xkv_generated_tokens_total")
    assert answered >= hit["usage"]["completion_tokens"]
    assert grown("xkv_time_to_first_token_seconds_count") == 2
    assert grown("xkv_inter_token_seconds_count") == answered - 2
    assert grown("xkv_lookup_seconds_count") == 2
    assert after["xkv_engines", ()] == 1
    assert after["xkv_resident_prefixes", ()] == 1
    assert after["xkv_resident_bytes", ("prefixes",)] > 0
    assert ("xkv_resident_bytes", ("running",)) in after
    assert grown("xkv_engine_generated_tokens_total") >= answered
    assert after["xkv_cost_seconds", ("prefill_token",)] > 0
    assert after["xkv_cost_seconds", ("load",)] >= 0 and after["xkv_cost_seconds", ("load_byte",)] >= 0


def test_who_has_an_answer_finds_it_counted(http: httpx.Client) -> None:
    for number in range(50):
        before = http.get("/status").json()["traffic"]["requests"]
        http.post("/v1/chat/completions", json={**OTHER, "max_tokens": 1, "stream": number % 2 == 0})
        assert http.get("/status").json()["traffic"]["requests"] == before + 1


def test_one_line_a_request(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xkv_service.api")
    headers = {"x-request-id": "mine-1"}
    http.post("/v1/chat/completions", json=OTHER, headers=headers)
    http.post("/v1/chat/completions", json={**OTHER, "n": 3}, headers=headers)

    def logged() -> list[logging.LogRecord]:
        found = [record for record in list(caplog.records) if hasattr(record, "request")]
        return [one for one in found if vars(one)["request_id"] == "mine-1"]  # others' may come late

    wait_until(lambda: len(logged()) == 2)
    records = sorted(logged(), key=lambda record: int(vars(record)["request"]["status"]))
    assert {vars(record)["request"]["route"] for record in records} == {"/v1/chat/completions"}
    answered, refused = (vars(record)["request"] for record in records)
    assert (answered["status"], refused["status"]) == (200, 400)
    assert answered["key"] == "anybody"
    assert answered["miss"] == "no_artifact"
    assert answered["generated_tokens"] <= 5
    assert answered["finish"] in ("stop", "length")
    assert 0 < answered["first_token_s"] <= answered["seconds"]
    assert f"status=200 seconds={answered['seconds']} key=anybody" in records[0].getMessage()
    assert "Hello" not in json.dumps([vars(record) for record in records], default=str)  # nobody's business


def test_a_slow_lookup_is_part_of_the_time_to_the_first_token(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: Any) -> Found:
        await asyncio.sleep(0.5)
        return None, NO_ARTIFACT

    def told() -> float:
        return metrics(http)["xkv_time_to_first_token_seconds_sum", ()]

    monkeypatch.setattr(PrefixFinder, "find", slow)
    before = told()
    http.post("/v1/chat/completions", json=OTHER)
    wait_until(lambda: told() - before >= 0.5, seconds=10)


def test_status(http: httpx.Client, backend: PacedBackend) -> None:
    http.post("/v1/chat/completions", json=CHAT)
    status: dict[str, Any] = {}

    def idle() -> bool:
        status.update(http.get("/status").json())
        return status["engine"]["running"] == status["traffic"]["in_flight"] == 0

    wait_until(idle)
    assert status["model"] == "tiny"
    assert status["engine"]["prefix_bytes"] > 0
    traffic = status["traffic"]
    assert traffic["hits"] >= 1 and traffic["tokens_per_second"] > 0


def test_what_no_engine_has_got_yet_waits_too(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PacedBackend, "waiting", 3)
    assert metrics(http)["xkv_sessions", ("waiting",)] == 3
    assert http.get("/status").json()["engine"]["waiting"] == 3


def test_the_page_fetches_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text
    assert "src=" not in answer.text and "href=" not in answer.text
