"""A server of this machine, for an example that is not told where one is."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from urllib.request import getproxies

import httpx

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
STORE = HERE.parent / ".demo" / "store"
RATIO = 20
_HOST = "127.0.0.1"
_START_S = 600.0


@contextmanager
def local_server(documents: Path = CORPUS, store: Path = STORE) -> Iterator[str]:
    """Compress what is new in a folder, and serve it with the bundled model while the block runs.

    A document that cannot be compressed is named on stderr, and the rest is served. Clients of this process
    reach the server without a proxy from now on.

    Args:
        documents: a folder. store: where its artifacts go; what is there already is not computed again.

    Yields:
        The base URL to give to an OpenAI client.

    Raises:
        SystemExit: nothing could be compressed, or the server failed; why is on stderr.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # else the server would stay behind
    _pass_by_proxies()
    place = ["--store", str(store)]
    _compress("--docs", str(documents), "--ratio", str(RATIO), *place)
    port = free_port()
    with TemporaryFile() as said:  # not the terminal, where it would stand within answers
        server = subprocess.Popen(_xkv("serve", "--port", str(port), *place), stdout=said, stderr=said)
        try:
            url = f"http://{_HOST}:{port}"
            _wait_until_ready(f"{url}/readyz", server)
            yield f"{url}/v1"
        finally:
            server.terminate()
            if server.wait():
                said.seek(0)
                sys.stderr.write(said.read().decode(errors="replace"))


def free_port() -> int:
    """A port of the loopback address that nobody listens at now.

    Neither one that Linux gives to who asks for any (from 32768 on) nor one that Ray gives to its workers (up
    to 19999): either may be taken again before the server starts.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server((_HOST, port)):
            return port


def _pass_by_proxies() -> None:
    """No proxy reaches this machine's own address. Both names, as either may hide the other."""
    known = getproxies().get("no", "")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = f"{known},{_HOST}".lstrip(",")


def _compress(*options: str) -> None:
    status = subprocess.run(_xkv("precompute", *options)).returncode
    if status and not (status == 1 and _any_stored(*options)):
        sys.exit(status)


def _any_stored(*options: str) -> bool:
    """Whether any of the documents is in the store."""
    dry = _xkv("precompute", *options, "--dry-run", "--json")
    # What failed was told before.
    told = subprocess.run(dry, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return bool(told) and any(line["action"] == "reuse" for line in json.loads(told)["plan"])


def _xkv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "xkv_cli", *arguments]


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(server.returncode or 1)
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit(f"the server was not ready within {_START_S:g} s")
