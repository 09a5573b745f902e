"""`xkv serve --replicas 1-2`: under load a second replica comes, and it goes without anybody noticing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asking import Asker, example_document, first_turn, wait_until
from scaling import Crowd, Logs, long_streams, questions, watching
from served import Server, use_factors

pytestmark = pytest.mark.slow

NAME = "bulletin-houston-lucky-dove-society"
TARGET = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("autoscaling")
    options = ("--replicas", "1-2", "--max-running", "1", "--target-requests", TARGET, "--stop-grace", "2s")
    delays = ("--upscale-delay", "0s", "--downscale-delay", "0s")
    started = Server(folder, "--store", folder / "store", *options, *delays)
    yield started
    assert started.stop() == 0, started.log.read_text()


def test_a_second_replica_comes_and_goes(server: Server) -> None:
    asker, logs, (document, items) = Asker(server.url), Logs(server), example_document(NAME)
    body = {"document": document, "ratio": 20, "pin": True}
    made = httpx.post(f"{server.url}/v1/prefixes", json=body, timeout=60).json()["id"]
    wait_until(lambda: httpx.get(f"{server.url}/v1/prefixes/{made}", timeout=60).json()["status"] == "ready")
    use_factors(f"{server.url}/v1", document)

    with watching(server) as watch:
        with Crowd(TARGET + 4, questions(asker, document, items)) as crowd:
            wait_until(lambda: watch.now == 2)
            newcomer = logs.replicas()[-1]
            wait_until(lambda: watch.counters["prefixes_loads"] == 2)  # the pinned prefix
            talk = _talk_with(newcomer, asker, document, items[0]["question"], logs)
        assert set(crowd.ends) == {"right"}

        # Three at once that one replica is to have: two are more than it takes, and so each has one.
        with Crowd(3, long_streams(asker, 2000)) as streams:
            wait_until(lambda: logs.decided("Downscaling") is not None)
        assert set(streams.ends) == {"whole"}
        wait_until(lambda: watch.now == 1)
        left, last = logs.decided("Downscaling"), logs.answered(newcomer)
        assert left is not None and last is not None and left < last, (
            "no stream ended on a replica that leaves"
        )

        messages, held = talk
        reply = asker.ask([*messages, {"role": "user", "content": items[1]["question"]}], max_tokens=8)
        assert reply.usage.prompt_tokens_details.cached_tokens >= held
        wait_until(lambda: watch.counters.get("tails_loaded") == 1)
        assert questions(asker, document, items)(0) == "right"

    assert [number for _, number in watch.engines] == [1, 2, 1]
    assert not watch.not_ready and not watch.fallen


def _talk_with(
    replica: str, asker: Asker, document: str, question: str, logs: Logs
) -> tuple[list[dict[str, str]], int]:
    """A conversation that one replica holds, and how many tokens of it."""
    for number in range(20):
        messages = first_turn(f"Copy {number}.\n{document}", question)
        name: dict[str, Any] = {"extra_headers": {"x-request-id": f"talk-{number}"}}
        reply = asker.ask(messages, max_tokens=8, timeout=300, **name)
        if logs.who_answered(f"talk-{number}") == replica:
            answer = {"role": "assistant", "content": reply.choices[0].message.content or ""}
            return [*messages, answer], reply.usage.prompt_tokens
    raise AssertionError("it was never asked")
