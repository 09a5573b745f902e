"""A real Redis for tests that stop, fill or damage one."""

from __future__ import annotations

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

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
