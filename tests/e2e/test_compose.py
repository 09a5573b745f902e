"""The services of docker-compose.yml work together, as processes of one machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from composed import ROOT, Composed
from served import use_factors

pytestmark = [pytest.mark.slow, pytest.mark.long]

DOCUMENT = "bulletin-houston-lucky-dove-society"
COPIES = 5
"""Twice it, each with another first line: too long to be given to a worker two at a time."""
SECRETS = {"XKV_REDIS_PASSWORD": "secret9", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    (tmp_path / "corpus").mkdir()
    text = (ROOT / "examples" / "corpus" / f"{DOCUMENT}.txt").read_text()
    (tmp_path / "corpus" / f"{DOCUMENT}.txt").write_text(text)
    for number in range(COPIES):
        (tmp_path / "corpus" / f"copy-{number}.txt").write_text(f"Copy {number}.\n{text}\n{text}")
    composed = Composed(tmp_path, {**SECRETS, "XKV_LOOKUP_TIMEOUT": "60s"})
    try:
        yield composed
    finally:
        composed.stop()


def test_a_chat_is_answered_from_what_a_job_on_the_cluster_stored(composed: Composed, tmp_path: Path) -> None:
    for service in ("redis", "ray-head"):
        composed.start(service)
    for service in ("redis", "ray-head"):
        composed.wait_healthy(service)
    for number in (1, 2):  # as the compose file says, or --scale worker=2; one by one: they share ports here
        composed.start("worker")
        composed.wait_said("worker", "Ray runtime started", number)
    composed.wait_healthy("worker")
    job = composed.run("precompute", "--ratio", "20", "--pin", "--json", "--workers", "2")
    assert job.returncode == 0, job.stderr
    made = json.loads(job.stdout)["artifacts"]
    assert len(made) == 1 + COPIES
    (stored,) = (one for one in made if DOCUMENT in one["document"])
    ran = composed.ran()
    nodes = ran.nodes_of("PrefixWorker")
    assert len(nodes) == len(set(nodes)) == 2 and [ran.cpus[node] for node in nodes] == [2, 2]
    took = before = ran.processes_of("PrefixWorker.compute")
    for namespace in ("again", "once-more"):  # one that had its model late may have found nothing to do
        if len(took) == 2:
            break
        again = composed.run("precompute", "--ratio", "20", "--workers", "2", "--namespace", namespace)
        assert again.returncode == 0, again.stderr
        after = composed.ran().processes_of("PrefixWorker.compute")
        took, before = after - before, after
    assert len(took) == 2, "both take jobs"

    composed.start("server")
    composed.wait_healthy("server")
    text = (tmp_path / "corpus" / f"{DOCUMENT}.txt").read_text().strip()
    questions = (ROOT / "examples" / "questions" / f"{DOCUMENT}.questions.jsonl").read_text().splitlines()
    item = json.loads(questions[0])
    body = {
        "model": "xkv-demo",
        "messages": [{"role": "user", "content": f"{text}\n\n{item['question']}"}],
        "temperature": 0,
        "max_tokens": 48,
    }
    use_factors(f"{composed.url}/v1", text)
    elsewhere = httpx.get(f"{composed.url}/v1/models", headers={"host": "elsewhere.example"}, timeout=60)
    assert elsewhere.status_code == 403, "without keys only this machine is served"
    answer = httpx.post(f"{composed.url}/v1/chat/completions", json=body, timeout=300).json()
    assert answer["choices"][0]["message"]["content"] == item["answer"]
    assert answer["xkv"]["artifact"] == stored["id"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= stored["tokens"] - 1
    ran = composed.ran()
    (engine,) = ran.nodes_of("engine")
    assert ran.cpus[engine] == 2, "the engine runs on a worker, and nothing on the other nodes"
    (proxy,) = ran.proxies
    assert ran.cpus[proxy] == 0, "Serve listens at the head"

    composed.kill("server")
    composed.start("server")
    composed.wait_said("server", "status page at", 2)
    answer = httpx.post(f"{composed.url}/v1/chat/completions", json=body, timeout=300).json()
    assert answer["choices"][0]["message"]["content"] == item["answer"]
