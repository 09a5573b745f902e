"""`xkv serve --replicas 1-2`: under load a second replica comes, and it goes without anybody noticing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from asking import Asker, example_document, first_turn, wait_until
from scaling import Crowd, Logs, long_streams, questions, watching
from served import Server, use_factors
from stopping import check_that_it_ends_with_its_ray

pytestmark = [pytest.mark.slow, pytest.mark.long]

NAME = "bulletin-houston-lucky-dove-society"
TARGET = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("autoscaling")
    options = ("--replicas", "1-2", "--max-running", "1", "--target-requests", TARGET, "--stop-grace", "2s")
    delays = ("--upscale-delay", "0s", "--downscale-delay", "15s")  # users come and go
    often = {"RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2"}  # requests are counted
    started = Server(folder, "--store", folder / "store", *options, *delays, environment=often)
    yield started
    started.stop()


def test_a_second_replica_comes_and_goes(server: Server) -> None:
    asker, logs, (document, items) = Asker(server.url), Logs(server), example_document(NAME)
    body = {"document": document, "ratio": 20, "pin": True}
    made = httpx.post(f"{server.url}/v1/prefixes", json=body, timeout=60).json()["id"]
    wait_until(lambda: httpx.get(f"{server.url}/v1/prefixes/{made}", timeout=60).json()["status"] == "ready")
    use_factors(f"{server.url}/v1", document)

    with watching(server) as watch:
        # More than twice it: a user has none under way between two, on a busy machine a third of the time.
        with Crowd(TARGET + 10, questions(asker, document, items)) as crowd:
            wait_until(lambda: watch.now == 2)
            newcomer = logs.replicas()[-1]
            wait_until(lambda: watch.counters["prefixes_loads"] == 2)  # the pinned prefix
            talks = _talks_with(newcomer, asker, document, items[0]["question"], logs)
        assert set(crowd.ends) == {"right"}

        # Four at once that one replica is to have: it takes two, so each has one that runs, one that waits.
        with Crowd(4, long_streams(asker, 500)) as streams:
            wait_until(lambda: logs.decided("Downscaling") is not None)
        assert set(streams.ends) == {"whole"}
        wait_until(lambda: watch.now == 1)
        left, last = logs.decided("Downscaling"), logs.answered(newcomer)
        assert left is not None and last is not None and left < last, (
            "no stream ended on a replica that leaves"
        )

        for messages, held in reversed(talks):  # one has to be stored, and found, in time
            reply = asker.ask([*messages, {"role": "user", "content": items[1]["question"]}], max_tokens=8)
            if reply.usage.prompt_tokens_details.cached_tokens >= held:
                break
        assert reply.usage.prompt_tokens_details.cached_tokens >= held
        wait_until(lambda: watch.counters.get("tails_loaded", 0) >= 1)
        assert questions(asker, document, items)(0) == "right"

    assert [number for _, number in watch.engines] == [1, 2, 1]
    assert not watch.not_ready and not watch.fallen


def test_one_whose_ray_is_gone_says_so(server: Server) -> None:
    """Its head: the server of this file ends here."""
    check_that_it_ends_with_its_ray(server, "gcs_server")


def _talks_with(
    replica: str, asker: Asker, document: str, question: str, logs: Logs
) -> list[tuple[list[dict[str, str]], int]]:
    """Two conversations or more that one replica holds, and how many tokens of each.

    They are asked for at once: one after the other they would take a while, in which it might leave.
    """

    def ask(number: int) -> tuple[str, list[dict[str, str]], int]:
        messages = first_turn(f"Copy {number}.\n{document}", question)
        name: dict[str, Any] = {"extra_headers": {"x-request-id": f"talk-{number}"}}
        reply = asker.ask(messages, max_tokens=8, timeout=300, **name)
        answer = {"role": "assistant", "content": reply.choices[0].message.content or ""}
        return logs.who_answered(f"talk-{number}"), [*messages, answer], reply.usage.prompt_tokens

    talks: list[tuple[list[dict[str, str]], int]] = []
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, 40, 8):
            answered = pool.map(ask, range(first, first + 8))
            talks += [(messages, held) for who, messages, held in answered if who == replica]
            if len(talks) > 1:
                return talks
    raise AssertionError("it was hardly ever asked")
