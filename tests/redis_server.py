"""A real Redis for tests that stop, fill or damage one."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from xkv_artifacts.embedded import server_binary
from xkv_artifacts.redis_link import RedisLink


class RedisServer:
    """A redis-server process of the test's own, on a unix socket, without persistence."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it, empty, and wait until it answers."""
        arguments = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", *options]
        self._process = subprocess.Popen([server_binary(), *arguments], stdout=subprocess.DEVNULL)
        RedisLink(self.url).call(lambda client: client.ping())

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
