"""Stops an embedded Redis that nobody uses any more: a script of its own, on the standard library alone.

Usage: embedded_watch.py SOCKET LOCK IDLE_SECONDS
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from types import TracebackType

WATCHER_NAME = "xkv-watcher"


class Connection:
    """A bare connection to Redis on a unix socket, for the few commands that need no client library.

    Raises:
        OSError: there is no server.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(10.0)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rb")

    def send(self, command: str) -> None:
        """Send a command without waiting for its answer."""
        self._socket.sendall(command.encode("ascii") + b"\r\n")

    def ask(self, command: str) -> str:
        """Send a command and return its answer: a line (with its type sign), or the text of a bulk string."""
        self.send(command)
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        if not line.startswith(b"$"):
            return line.decode("utf-8", "replace").strip()
        length = int(line[1:])
        return self._file.read(length + 2)[:length].decode("utf-8", "replace")

    def wait_closed(self, seconds: float) -> bool:
        """Wait; True as soon as the server is gone."""
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(1) == b""
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(10.0)

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def others(connection: Connection) -> int:
    """Clients of the server besides this connection and watchers."""
    mine = connection.ask("CLIENT ID").lstrip(":")
    clients = [dict(part.partition("=")[::2] for part in line.split()) for line in _lines(connection)]
    return sum(client.get("id") != mine and client.get("name") != WATCHER_NAME for client in clients)


def _lines(connection: Connection) -> list[str]:
    return connection.ask("CLIENT LIST").splitlines()


def watch(path: str, lock: str, idle_s: float) -> None:
    """Stop the server on `path` when it had no client for `idle_s` seconds; return when it is gone.

    Raises:
        OSError: the server is gone.
    """
    with _introduced(path, lock) as connection:
        last_used = time.monotonic()
        while not connection.wait_closed(min(idle_s / 4, 15.0)):
            if others(connection):
                last_used = time.monotonic()
            elif time.monotonic() - last_used >= idle_s and _stop(connection, lock):
                return


def _introduced(path: str, lock: str) -> Connection:
    """A connection that others know as the watcher's; under the lock, so that nobody counts it before."""
    with open(lock, "ab") as file:  # noqa: PTH123 - pathlib would double the start-up time
        fcntl.flock(file, fcntl.LOCK_EX)
        connection = Connection(path)
        connection.ask(f"CLIENT SETNAME {WATCHER_NAME}")
    return connection


def _stop(connection: Connection, lock: str) -> bool:
    """Shut the server down unless somebody is just coming in (they hold the lock)."""
    with open(lock, "ab") as file:  # noqa: PTH123 - pathlib would double the start-up time
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if others(connection):
            return False
        connection.send("SHUTDOWN")
        return connection.wait_closed(20.0)


def main() -> None:
    """Become a daemon and watch."""
    if os.fork():
        os._exit(0)
    try:
        watch(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    except OSError:
        return  # the server is gone, which is what this process waits for


if __name__ == "__main__":
    main()
