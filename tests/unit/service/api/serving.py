"""A server for tests: the app under uvicorn, in a thread of its own, on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from openai import OpenAI
from starlette.types import ASGIApp

LONG_CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Count to a thousand."}],
    "temperature": 0,
    "max_tokens": 1500,
}
"""A request whose answer is long."""


@dataclass(frozen=True)
class Served:
    """A server that answers at `url`."""

    url: str
    port: int

    def client(self, key: str = "none") -> OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def serve(app: ASGIApp, host: str = "127.0.0.1") -> Iterator[Served]:
    """Run the app until the block ends."""
    listener = socket.create_server((host, 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listener.getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", port)
    finally:
        server.should_exit = True
        thread.join(120)
        listener.close()
        assert not thread.is_alive()
