"""What can be done to a server and its store while it has users."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import psutil

if TYPE_CHECKING:
    from traffic_damage import Damage
    from traffic_redis import OwnRedis

FAULTS = (
    *("none", "kill-replica", "kill-redis", "empty-redis", "redis-away", "redis-hangs", "redis-emptied"),
    *("corrupt", "missing", "slow-disk"),
)
OWN_REDIS = ("redis-away", "redis-hangs", "redis-emptied")
"""Those of a Redis that is not embedded."""
_POLLS = 10
_CHUNK = 16 << 10
_SLOW_BYTES_S = 300_000
_PATIENCE_S = 60.0
Seen = TypeVar("Seen")
_LISTED = re.compile(r"([1-9]\d*) prefixes are listed again")


class Strike:
    """One fault: done once, and shown to have happened.

    Args:
        server: the process. url: where it answers. store: its folder. log: of the server.
        disk: the way to its blobs, where they are in an object store. redis: where it is not embedded.
        damage: of some of its blobs.
    """

    def __init__(
        self,
        fault: str,
        *,
        server: int,
        url: str,
        store: Path,
        log: Path,
        disk: SlowLink | None,
        redis: OwnRedis | None,
        damage: Damage,
    ) -> None:
        self.fault = fault
        self._server, self._url, self._store, self._log = server, url, store, log
        self._disk, self._redis, self._damage = disk, redis, damage
        self._did: dict[str, Any] = {}

    def now(self) -> None:
        """Do it; what goes away is waited for until it is back."""
        if self.fault in ("corrupt", "missing"):
            self._damage.strike(missing=self.fault == "missing")
            self._did["lost_blobs"] = list(self._damage.ids)
        elif self.fault == "kill-replica":
            self._did["under_way"] = self._wait(self._under_way) if self._replicas() else 0
            self._did["killed_replicas"] = _kill(self._replicas())
        elif self.fault == "kill-redis":
            self._did["killed_redis"] = _kill(_redis(self._store))
        elif self.fault == "empty-redis":
            # Before it dies: the server has it back within moments, and it would read them.
            self._did["deleted"] = _delete_saved(self._store)
            self._did["killed_redis"] = _kill(_redis(self._store))
        elif self.fault == "redis-away" and self._redis is not None:
            self._did = self._redis.go_away()
        elif self.fault == "redis-emptied" and self._redis is not None:
            self._did = self._redis.lose_all()
        elif self.fault == "redis-hangs" and self._redis is not None:
            with _polling(f"{self._url}/v1/prefixes") as told:
                self._did = self._redis.hang()
            self._did["polls"] = dict(told)
        elif self.fault == "slow-disk" and self._disk is not None:
            self._disk.bytes_s = self._did["bytes_s"] = _SLOW_BYTES_S

    def proof(self) -> dict[str, Any]:
        """What was done and what is seen of it, waited for; nothing without a fault.

        Raises:
            RuntimeError: it did not happen.
        """
        if self.fault == "none":
            return {}
        if not self._did or not all(self._did.values()):
            raise RuntimeError(f"{self.fault} was not done: {self._did}")
        seen = self._seen()
        if not all(seen.values()):
            raise RuntimeError(f"nothing was seen of {self.fault}: {seen}")
        return self._did | seen

    def _seen(self) -> dict[str, Any]:
        if self.fault == "kill-replica":
            killed = self._did["killed_replicas"]
            others = self._wait(lambda: [one.pid for one in self._replicas() if one.pid not in killed])
            return {"replicas_after": others}
        if self.fault in ("kill-redis", "empty-redis"):
            killed = self._did["killed_redis"]
            back = self._wait(lambda: [one.pid for one in _redis(self._store) if one.pid not in killed])
            return {"redis_after": back, "said": self._wait(self._said)}
        if self._redis is not None:
            return {"keys_after": self._redis.keys()}
        return {"slow_bytes": self._disk.slow_bytes} if self._disk is not None else {}

    def _replicas(self) -> list[psutil.Process]:
        return [one for one in psutil.Process(self._server).children(recursive=True) if _is_engine(one)]

    def _said(self) -> list[str]:
        """Lines of the server about its Redis; of one that was emptied what was listed again, too."""
        lines = [line for line in self._log.read_text().splitlines() if "embedded Redis" in line]
        relisted = any(_LISTED.search(line) for line in lines)
        return lines if relisted or self.fault == "kill-redis" else []

    def _under_way(self) -> int:
        """Requests that the fault will meet."""
        status = httpx.get(f"{self._url}/status", timeout=60, trust_env=False).json()
        return int(status["traffic"]["in_flight"])

    def _wait(self, look: Callable[[], Seen]) -> Seen:
        end = time.monotonic() + _PATIENCE_S
        while not (seen := look()) and time.monotonic() < end:
            time.sleep(0.05)
        return seen


@contextmanager
def _polling(url: str) -> Iterator[Counter[int]]:
    """Ask for a page again and again, several at a time, as open status pages do; how often each status was
    told."""
    told, over = Counter[int](), threading.Event()

    def ask() -> None:
        while not over.wait(0.2):
            told[httpx.get(url, timeout=120, trust_env=False).status_code] += 1

    with ThreadPoolExecutor(_POLLS) as pool:
        asking = [pool.submit(ask) for _ in range(_POLLS)]
        try:
            yield told
        finally:
            over.set()
        for one in asking:
            one.result()


def _kill(processes: Iterable[psutil.Process]) -> list[int]:
    killed = []
    for process in processes:
        process.kill()
        killed.append(process.pid)
    return killed


def _delete_saved(store: Path) -> list[str]:
    """What the embedded Redis wrote: one file, or the parts of it in a folder, as its version has it."""
    files = [path for path in (store / "catalog").rglob("*.aof*") if path.is_file()]
    for path in files:
        path.unlink()
    return [str(path.relative_to(store)) for path in files]


def _redis(store: Path) -> list[psutil.Process]:
    """The embedded ones of a store."""
    found = []
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error):
            if "redis-server" in process.info["name"] and Path(process.cwd()).is_relative_to(store.resolve()):
                found.append(process)
    return found


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "xkv:engine" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class SlowLink:
    """Forwards TCP connections to a port of this machine; answers come at `bytes_s` (None: at once).

    Attributes:
        slow_bytes: of answers that came so.
    """

    def __init__(self, to: int) -> None:
        self.bytes_s: float | None = None
        self.slow_bytes = 0
        self.port = 0
        self._to, self._free = to, 0.0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        threading.Thread(target=self._serve, args=(ready,), daemon=True).start()
        ready.wait()

    def _serve(self, ready: threading.Event) -> None:
        async def run() -> None:
            server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
            self.port = int(server.sockets[0].getsockname()[1])
            ready.set()
            await server.serve_forever()

        self._loop.run_until_complete(run())

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(self._pump(reader, back, limited=False), self._pump(there, writer, limited=True))

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, limited: bool
    ) -> None:
        try:
            while data := await reader.read(_CHUNK):
                if limited and self.bytes_s is not None:  # all connections share the disk
                    self._free = max(self._free, time.monotonic()) + len(data) / self.bytes_s
                    self.slow_bytes += len(data)
                    await asyncio.sleep(self._free - time.monotonic())
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@contextmanager
def object_store(folder: Path) -> Iterator[SlowLink]:
    """An S3 server (moto's) and a Redis, which the environment of this process points everybody at."""
    from redis_server import RedisServer

    from examples.local_server import free_port

    redis = RedisServer(folder / "redis")
    redis.start()
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        link = SlowLink(port)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{link.port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_DEFAULT_REGION": "us-east-1",
            "XKV_REDIS_URL": redis.url,
        }
        _make_bucket(port)
        yield link
    finally:
        server.kill()
        server.wait()
        redis.kill()


def _make_bucket(port: int) -> None:
    import boto3

    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    boto3.client("s3").create_bucket(Bucket="traffic")
