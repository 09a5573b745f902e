"""One `xkv serve` for each Ray: who has it, what a killed one leaves, and what is left as it was found."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from asking import wait_until

from examples.local_server import free_port
from xkv_workers.cluster import cluster
from xkv_workers.errors import ServerFailed
from xkv_workers.serving import instance, presence
from xkv_workers.serving.settings import APP

pytestmark = [pytest.mark.slow, pytest.mark.long]

_DRIVER = """
import sys
from ray import serve
from xkv_workers.cluster import cluster
from xkv_workers.serving.instance import claim_board, start_serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Hello:
    async def __call__(self, request):
        return "hello"

address, name, port = sys.argv[1:]
with cluster(address):
    board = claim_board() if name == "xkv" else None
    start_serve("127.0.0.1", int(port), "text")
    serve.run(Hello.bind(), name=name, route_prefix="/")
    print("up", file=sys.__stdout__, flush=True)
    sys.stdin.read()
"""


@contextmanager
def driver(address: str, name: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has deployed an application of a name, until it is killed."""
    command = [sys.executable, "-c", _DRIVER, address, name, str(port)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        assert "up\n" in iter(started.stdout.readline, ""), "it did not come up"
        yield started
    finally:
        started.kill()
        started.wait()


def says(port: int) -> str | None:
    """What is answered at a port; None where nobody listens."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text
    except httpx.ConnectError:
        return None


def test_one_server_at_a_time_and_the_next_one_takes_what_a_killed_one_left(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    first, second = free_port(), free_port()
    with cluster(ray_address):
        with driver(ray_address, APP, first):
            assert says(first) == "hello"
            monkeypatch.setattr(instance, "_CLAIM_S", 1.0)
            with pytest.raises(ServerFailed, match="another xkv serve runs on this Ray"):
                instance.claim_board()
            assert says(first) == "hello"
        monkeypatch.setattr(instance, "_CLAIM_S", 60.0)
        claimed = instance.claim_board()
        assert says(first) == "hello", "Serve outlives who started it"
        try:
            instance.start_serve("127.0.0.1", second, "text")
            assert says(first) is None and says(second) is not None
            assert list(serve.status().applications) == []
        finally:
            instance.end_serve(shared=True)
        assert says(second) is None
        monkeypatch.setattr(instance, "_CLAIM_S", 0.0)
        with pytest.raises(ServerFailed):
            instance.claim_board()
        del claimed  # not before: whoever has it is the server


def test_a_server_that_others_take_off_serve_knows(ray_address: str) -> None:
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    port = free_port()
    with driver(ray_address, APP, port), cluster(ray_address):
        try:
            assert instance.has_application()
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            ray.kill(controller, no_restart=False)
            for _ in range(20):
                assert instance.has_application(), "Ray brings the controller back"
                time.sleep(0.25)
            serve.delete(APP)
            assert not instance.has_application()
        finally:
            serve.shutdown()
        assert not instance.has_application()
        instance.end_serve(shared=True)  # there is nothing to end, and nothing is said


def test_a_board_that_comes_back_hears_of_who_calls(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.exceptions import RayActorError

    with cluster(ray_address):
        board = instance.claim_board()

        def known() -> list[Any] | None:
            try:
                found: list[Any] = ray.get(board.presence_of.remote(here.caller))
            except RayActorError:
                return None
            return found

        async def tell(times: int) -> None:
            for _ in range(times):
                here.tell_again()
                await asyncio.sleep(0.2)

        here = presence.Presence(board)
        [first] = known() or []
        ray.kill(board, no_restart=False)
        wait_until(lambda: known() == [])
        monkeypatch.setattr(presence, "_AGAIN_S", 3600.0)
        asyncio.run(tell(2))
        assert known() == [], "it was told a moment ago"
        here._told -= 3600.0
        asyncio.run(tell(1))
        wait_until(lambda: bool(known()))
        [promise] = known() or []
        assert promise == first
        assert ray.wait([promise], timeout=1) == ([], [promise]), "its owner lives"


def test_of_servers_that_start_at_once_one_has_the_ray(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_CLAIM_S", 20.0)
    with cluster(ray_address), ThreadPoolExecutor(4) as pool:
        claims = [pool.submit(instance.claim_board) for _ in range(4)]
        refused = [str(claim.exception()) for claim in claims if claim.exception()]
        assert len(refused) == 3 and all("another xkv serve runs on this Ray" in one for one in refused)


def test_a_serve_that_does_not_end_is_waited_for_and_then_refused(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not heed its shutdown; then one whose application does not end, which is left up."""
    from ray import serve

    port = free_port()
    with driver(ray_address, APP, port), cluster(ray_address):
        monkeypatch.setattr(instance, "_GONE_S", 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(serve, "shutdown", lambda: None)
            with pytest.raises(ServerFailed, match="has not ended in 1 s"):
                instance.start_serve("127.0.0.1", port, "text")
        monkeypatch.undo()
        with monkeypatch.context() as patched:
            patched.setattr(serve, "delete", _late)
            instance.end_serve(shared=True)
        assert says(port) == "hello", "its shutdown could last, and no other server would come up"
        instance.start_serve("127.0.0.1", port, "text")
        assert says(port) != "hello"
        serve.shutdown()


def _late(_: str) -> None:
    raise TimeoutError("the deployment's replicas do not end")


def test_what_others_run_on_serve_stays(ray_address: str) -> None:
    port, wanted = free_port(), free_port()
    with driver(ray_address, "other", port), cluster(ray_address):
        try:
            with pytest.raises(ServerFailed, match=rf"listens at 127.0.0.1:{port} alone") as caught:
                instance.start_serve("127.0.0.1", wanted, "text")
            assert f"--port {port}" in caught.value.hint
            instance.start_serve("127.0.0.1", port, "text")
            instance.end_serve(shared=True)
            assert says(port) == "hello" and says(wanted) is None
        finally:
            from ray import serve

            serve.shutdown()
