"""`xkv serve --replicas 2`: a prefix has its replica, a burst spills over, one may die, and they stop."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from asking import Asker, example_document, wait_until
from scaling import Crowd, Logs, questions
from served import Server, use_factors
from stopping import check_that_sigterm_breaks_off_answers, wait_until_running

pytestmark = [pytest.mark.slow, pytest.mark.long]

NAME = "bulletin-houston-lucky-dove-society"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    options = ("--replicas", "2", "--max-running", "2", "--stop-grace", "6s")
    # Where its own replica is late to say how busy it is, a prefix goes to the other one.
    patient = {"RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30"}
    started = Server(folder, "--store", folder / "store", *options, environment=patient)
    yield started
    assert started.stop() == 0, started.log.read_text()


def test_two_replicas_share_the_work_and_one_may_die(server: Server) -> None:
    asker, (document, items) = Asker(server.url), example_document(NAME)
    made = httpx.post(f"{server.url}/v1/prefixes", json={"document": document, "ratio": 20}, timeout=60)
    url = f"{server.url}/v1/prefixes/{made.json()['id']}"
    wait_until(lambda: httpx.get(url, timeout=60).json()["status"] == "ready")
    use_factors(f"{server.url}/v1", document)

    ask = questions(asker, document, items[:8])
    assert [ask(number) for number in range(4)] == ["right"] * 4
    wait_until(lambda: _counter(server, "steps") > 0)
    assert _counter(server, "prefixes_loads") == 1, "both replicas loaded it"

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ask, range(40))) == ["right"] * 40
    wait_until(lambda: _counter(server, "prefixes_loads") == 2)  # on the other one, too

    wait_until_running(server, 0)
    with Crowd(8, ask) as crowd:  # as many as the two take at once
        wait_until(lambda: _kill_a_busy_one(server))
    assert set(crowd.ends) == {"right"}


def test_at_sigterm_running_answers_end_with_an_error_and_later_ones_are_refused(server: Server) -> None:
    """The server of this file ends here."""
    check_that_sigterm_breaks_off_answers(server)


def _kill_a_busy_one(server: Server) -> bool:
    """Kill a replica, and wait for the next; whether a request began again: between two it may have none."""
    wait_until_running(server, 4)
    victim = server.engine_process()
    victim.kill()
    victim.wait(60)
    wait_until(lambda: len(server.processes("xkv:engine")) == 2)
    return Logs(server).began_again()


def _counter(server: Server, name: str) -> float:
    """Of both engines together, as they said a second ago at most."""
    time.sleep(1.5)
    return sum(map(float, re.findall(rf"^xkv_engine_{name}_total ([\d.]+)", server.metrics(), re.MULTILINE)))
