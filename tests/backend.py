"""A web app in this process, and what waits for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI


def until(holds: Callable[[], bool]) -> bool:
    """Whether it holds within two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if holds():
                return True
        except httpx.ReadTimeout:  # it was taken, and waits for the server
            pass
        time.sleep(0.05)
    return False


@contextmanager
def backend_of(app: FastAPI) -> Iterator[str]:
    """The app in this process, in a thread; where it is."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        listener.close()
    assert not thread.is_alive()
