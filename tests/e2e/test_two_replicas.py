"""`xkv serve --replicas 2`: a prefix has its replica, a burst spills over, and one may die."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from openai import APIStatusError
from served import Server, use_factors
from test_serve import Asker, _document, _first

NAME = "bulletin-houston-lucky-dove-society"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    started = Server(folder, "--store", folder / "store", "--replicas", "2", "--max-running", "2")
    yield started
    assert started.stop() == 0, started.log.read_text()


def test_two_replicas_share_the_work_and_one_may_die(server: Server) -> None:
    asker, (document, questions) = Asker(server.url), _document(NAME)
    made = httpx.post(f"{server.url}/v1/prefixes", json={"document": document, "ratio": 20}, timeout=60)
    url = f"{server.url}/v1/prefixes/{made.json()['id']}"
    _until(lambda: httpx.get(url, timeout=60).json()["status"] == "ready")
    use_factors(f"{server.url}/v1", document)

    def right(item: dict[str, str]) -> bool | int:
        """Whether an answer is right, or the status of a clean refusal."""
        try:
            reply = asker.ask(_first(document, item["question"]), timeout=300)
        except APIStatusError as error:
            return error.status_code
        return bool(reply.choices[0].message.content == item["answer"])

    assert [right(item) for item in questions[:4]] == [True] * 4
    _until(lambda: _counter(server, "steps") > 0)
    assert _counter(server, "prefixes_loads") == 1, "both replicas loaded it"

    with ThreadPoolExecutor(40) as pool:
        ends = list(pool.map(right, questions[:8] * 5))
    assert set(ends) <= {True, 503} and True in ends
    _until(lambda: _counter(server, "prefixes_loads") == 2)  # on the other one, too

    victim = next(p for p in psutil.Process(server.process.pid).children(recursive=True) if _is_engine(p))
    with ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(right, item) for item in questions[:8] * 2]
        time.sleep(0.3)
        os.kill(victim.pid, signal.SIGKILL)
        ends = [one.result() for one in under_way]
    assert set(ends) <= {True, 500, 503} and True in ends
    _until(lambda: right(questions[0]) is True)


def _is_engine(process: psutil.Process) -> bool:
    return "EngineReplica" in " ".join(process.cmdline()) or "engine" in process.name()


def _counter(server: Server, name: str) -> float:
    """Of both engines together, as they said a second ago at most."""
    time.sleep(1.5)
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    return sum(map(float, re.findall(rf"^xkv_engine_{name}_total ([\d.]+)", page, re.MULTILINE)))


def _until(met: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.3)
