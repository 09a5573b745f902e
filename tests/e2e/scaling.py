"""A server under more requests than a replica is to have: who asks, and what is seen of the replicas."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from asking import Asker, first_turn, wait_until
from openai import OpenAIError
from served import Server

_LOOK_S = 0.25
_ANSWERED = "CALL generate OK"


@dataclass
class Watch:
    """What is seen of a server.

    Attributes:
        engines: their number, each with the Unix time at which it became so.
        not_ready: what /readyz answered other than 200.
        counters: of the engines, as they were last. fallen: those that fell.
    """

    server: Server
    engines: list[tuple[float, int]] = field(default_factory=list)
    not_ready: list[int] = field(default_factory=list)
    fallen: list[str] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def now(self) -> int:
        """Engines, a moment ago."""
        return self.engines[-1][1] if self.engines else 0

    def look(self) -> None:
        """Once."""
        ready = httpx.get(f"{self.server.url}/readyz", timeout=60).status_code
        if ready != 200:
            self.not_ready.append(ready)
        page = self.server.metrics()
        engines = int(float(_figures(page, "xkv_(engines)")["engines"]))
        if engines != self.now:
            self.engines.append((time.time(), engines))
        counters = _figures(page, r"xkv_engine_(\w+)_total")
        self.fallen += [name for name, value in self.counters.items() if counters.get(name, 0) < value]
        self.counters = counters


@contextmanager
def watching(server: Server) -> Iterator[Watch]:
    """While the block runs."""
    watch, over = Watch(server), threading.Event()

    def run() -> None:
        while not over.wait(_LOOK_S):
            watch.look()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            yield watch
        finally:
            over.set()
        running.result()


def _figures(page: str, name: str) -> dict[str, float]:
    return {found: float(value) for found, value in re.findall(rf"^{name} (\S+)$", page, re.MULTILINE)}


class Crowd:
    """Users who do the same again and again, each in a thread, until `stop`. A context manager.

    Attributes:
        ends: what each time came to, in the order of their ends.
    """

    def __init__(self, users: int, turn: Callable[[int], Any]) -> None:
        self.ends: list[Any] = []
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(users)
        self._users: list[Future[None]] = [self._pool.submit(self._use, turn, user) for user in range(users)]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _use(self, turn: Callable[[int], Any], user: int) -> None:
        while not self._over.is_set():
            self.ends.append(turn(user))

    def stop(self) -> list[Any]:
        """When each has come to an end."""
        self._over.set()
        for user in self._users:
            user.result()
        self._pool.shutdown()
        return self.ends


def questions(asker: Asker, document: str, items: list[dict[str, str]]) -> Callable[[int], str]:
    """A user's turn: a question, whose answer is right, wrong, or an error."""
    turns = iter(range(1_000_000))

    def ask(_: int) -> str:
        item = items[next(turns) % len(items)]
        try:
            reply = asker.ask(first_turn(document, item["question"]), timeout=300)
        except OpenAIError as error:
            return repr(error)
        return "right" if reply.choices[0].message.content == item["answer"] else "wrong"

    return ask


def long_streams(asker: Asker, tokens: int) -> Callable[[int], str]:
    """A user's turn: a stream of so many tokens, or less often fewer, which is whole, or how it ended.

    All begin in the same way, so that they belong to one replica, and to the next where that is full.
    """
    seeds = iter(range(1_000_000))
    text = "Write the names of all rivers, with their lengths. " * 30

    def listen(user: int) -> str:
        options = {"max_tokens": tokens, "temperature": 2.0, "seed": next(seeds)}
        try:
            events = asker.client.completions.create(
                model=asker.model, prompt=f"{text}{user}", stream=True, timeout=600, **options
            )
            ends = [event.choices[0].finish_reason for event in events if event.choices]
        except OpenAIError as error:
            return repr(error)
        return "whole" if ends and ends[-1] in ("length", "stop") else f"ended with {ends[-1:]}"

    return listen


class Logs:
    """What Ray Serve's logs say of a server's engines."""

    def __init__(self, server: Server) -> None:
        found = re.search(r"logs in (\S+)", server.log.read_text())
        assert found is not None
        self._folder = Path(found[1])

    def decided(self, way: str) -> float | None:
        """When the number of engines was last changed, `way` being Upscaling or Downscaling; Unix seconds."""
        return self._controller(f"{way} Deployment(name='engine'")

    def started(self, replica: str) -> float | None:
        """When a replica could take requests."""
        return self._controller(f"Replica(id='{replica}', deployment='engine', app='xkv') started")

    def stopped(self, replica: str) -> float | None:
        """When its process had ended."""
        return self._controller(f"Replica(id='{replica}', deployment='engine', app='xkv') is stopped")

    def replicas(self) -> list[str]:
        """Ids of all engines that there were, the first one first."""
        began = {
            path: _time(path.open().readline()) for path in self._folder.glob("replica_xkv_engine_*.log")
        }
        return [path.stem.rpartition("_")[2] for path in sorted(began, key=began.__getitem__)]

    def answered(self, replica: str) -> float | None:
        """When a replica last came to the end of an answer."""
        return self._last([self._file(replica)], _ANSWERED)

    def began_again(self) -> bool:
        """Whether a replica died under a request that another one was given then."""
        return self._last(self._folder.glob("replica_xkv_ingress_*.log"), "starts again") is not None

    def who_answered(self, request_id: str) -> str:
        """The replica that answered a request; its log may come after the answer. One that was full has a
        line of it in its log, too.
        """
        found: list[str] = []

        def look() -> bool:
            found[:] = [one for one in self.replicas() if self._has_answered(one, request_id)]
            return bool(found)

        wait_until(look, seconds=30)
        return found[0]

    def _has_answered(self, replica: str, request_id: str) -> bool:
        lines = self._file(replica).read_text().splitlines(keepends=True)
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        return any(_ANSWERED in line["message"] and line.get("request_id") == request_id for line in told)

    def _file(self, replica: str) -> Path:
        return self._folder / f"replica_xkv_engine_{replica}.log"

    def _controller(self, words: str) -> float | None:
        return self._last(self._folder.glob("controller_*.log"), words)

    def _last(self, files: Iterable[Path], words: str) -> float | None:
        times = [_time(line) for path in files for line in path.read_text().splitlines() if words in line]
        return max(times, default=None)


def _time(line: str) -> float:
    return datetime.strptime(json.loads(line)["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp()
