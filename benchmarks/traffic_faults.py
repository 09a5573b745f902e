"""What can be done to a server and its store while it has users."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from traffic_damage import Damage

FAULTS = ("none", "kill-replica", "kill-redis", "empty-redis", "corrupt", "missing", "slow-disk")
_CHUNK = 16 << 10
_SLOW_BYTES_S = 300_000


def strike(fault: str, server: int, store: Path, disk: SlowLink | None, damage: Damage) -> None:
    """Do it now.

    Args:
        server: the process. store: its folder. disk: the way to its blobs, where they are in an object store.
        damage: of some of its blobs.
    """
    if fault in ("corrupt", "missing"):
        damage.strike(missing=fault == "missing")
    if fault == "kill-replica":
        for process in psutil.Process(server).children(recursive=True):
            if "xkv:engine" in " ".join(process.cmdline()):
                process.kill()
    if fault in ("kill-redis", "empty-redis"):
        for process in psutil.process_iter(["name", "cmdline"]):
            if "redis-server" in (process.info["name"] or "") and str(store) in " ".join(
                [*(process.info["cmdline"] or ()), *_folder(process)]
            ):
                process.send_signal(signal.SIGKILL)
    if fault == "empty-redis":
        for path in store.rglob("*.rdb"):
            path.unlink()
    if fault == "slow-disk" and disk is not None:
        disk.bytes_s = _SLOW_BYTES_S


def _folder(process: psutil.Process) -> list[str]:
    try:
        return [str(process.cwd())]
    except psutil.Error:
        return []


class SlowLink:
    """Forwards TCP connections to a port of this machine; answers come at `bytes_s` (None: at once)."""

    def __init__(self, to: int) -> None:
        self.bytes_s: float | None = None
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

    redis = RedisServer(folder / "redis")
    redis.start()
    port = _free_port()
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
