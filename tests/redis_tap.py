"""A wire between a client and a real Redis that keeps what goes over it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Literal

Sent = tuple[Literal["asked", "told"], bytes]


class RedisTap:
    """Listens on a socket of its own and passes every byte on, both ways.

    Args:
        folder: for its socket. target: the socket of the Redis.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._target, path = target, folder / "tap.sock"
        self.url = f"unix://{path}"
        self._lock, self._sent = threading.Lock(), list[Sent]()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def take(self) -> list[Sent]:
        """What went over it since the last time: commands and answers by turns, where they take turns."""
        with self._lock:
            sent, self._sent = self._sent, []
        return sent

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._target))
            for source, sink, way in ((client, server, "asked"), (server, client, "told")):
                threading.Thread(target=self._pass, args=(source, sink, way), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: Literal["asked", "told"]) -> None:
        try:
            while data := source.recv(1 << 16):
                self._keep(way, data)
                sink.sendall(data)
        except OSError:  # one of the two is gone
            pass
        finally:
            sink.close()

    def _keep(self, way: Literal["asked", "told"], data: bytes) -> None:
        with self._lock:
            if self._sent and self._sent[-1][0] == way:
                data = self._sent.pop()[1] + data
            self._sent.append((way, data))
