"""The services of docker-compose.yml work together, as processes of one machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from composed import ROOT, Composed, until

DOCUMENT = "bulletin-houston-lucky-dove-society"
SECRETS = {"XKV_REDIS_PASSWORD": "secret9", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    (tmp_path / "corpus").mkdir()
    shutil.copy(ROOT / "examples" / "corpus" / f"{DOCUMENT}.txt", tmp_path / "corpus")
    composed = Composed(tmp_path, SECRETS)
    try:
        yield composed
    finally:
        composed.stop()


def test_a_chat_is_answered_from_what_a_job_on_the_cluster_stored(composed: Composed, tmp_path: Path) -> None:
    for service in ("redis", "ray-head"):
        composed.start(service)
    for service in ("redis", "ray-head"):
        composed.wait_healthy(service)
    composed.start("worker")
    until(lambda: "Ray runtime started" in composed.log("worker"))
    composed.wait_healthy("worker")
    job = composed.run("precompute", "--ratio", "20", "--pin", "--json")
    assert job.returncode == 0, job.stderr
    (stored,) = json.loads(job.stdout)["artifacts"]

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
    end = time.monotonic() + 60
    while True:  # a slow machine may compute the prompt sooner than it loads the prefix
        answer = httpx.post(f"{composed.url}/v1/chat/completions", json=body, timeout=120).json()
        if answer["xkv"]["artifact"]:
            break
        assert time.monotonic() < end, answer
    assert answer["choices"][0]["message"]["content"] == item["answer"]
    assert answer["xkv"]["artifact"] == stored["id"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= stored["tokens"] - 1
    assert composed.engine_cpus() == [2], "the engine runs on the worker, and nothing on the other nodes"
