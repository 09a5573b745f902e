"""A Redis of the benchmark's own, as operators run one: it goes away for a while, hangs, or loses all."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xkv_artifacts.embedded import server_binary
from xkv_artifacts.redis_link import RedisLink

AWAY_S = 20.0
_LISTED_S = 120.0
"""A server looks for what an emptied catalog lacks once a minute."""


class OwnRedis:
    """A redis-server on a port of this machine, which appends each change to a file.

    Args:
        folder: for its data; must not exist. away_s: seconds, when it goes away.

    Raises:
        CatalogUnavailable: it does not start.
    """

    def __init__(self, folder: Path, *, away_s: float = AWAY_S) -> None:
        from examples.local_server import free_port

        folder.mkdir()
        self._folder, self._port, self._away_s = folder, free_port(), away_s
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._span = (0.0, 0.0)
        self._process = self._start()

    def keys(self) -> int:
        """How many it has.

        Raises:
            CatalogUnavailable: it does not answer.
        """
        return self._ask(lambda client: client.dbsize())

    def listed(self) -> int:
        """How many artifacts it lists. Raises as `keys`."""
        return self._ask(lambda client: sum(1 for _ in client.scan_iter("*:entry:*")))

    def _ask(self, ask: Callable[[Any], Any]) -> int:
        link = RedisLink(self.url)
        try:
            return int(link.call(ask))
        finally:
            link.close()

    def go_away(self) -> dict[str, Any]:
        """SIGKILL, nothing for a while, then the same port and data again: what happened.

        Raises:
            CatalogUnavailable: it does not come back.
        """
        found = {"killed_redis": [self._process.pid], "keys_before": self.keys()}
        self.kill()
        gone = time.monotonic()
        time.sleep(self._away_s)
        self._process = self._start()
        return {**found, "redis_after": [self._process.pid], **self._back(gone)}

    def hang(self) -> dict[str, Any]:
        """SIGSTOP: connections stay open and nothing is answered, for a while. What happened."""
        found = {"stopped_redis": [self._process.pid], "keys_before": self.keys()}
        self._process.send_signal(signal.SIGSTOP)
        gone = time.monotonic()
        time.sleep(self._away_s)
        self._process.send_signal(signal.SIGCONT)
        return {**found, **self._back(gone)}

    def lose_all(self) -> dict[str, Any]:
        """SIGKILL, then at once the same port with nothing in it, until it lists again what it did,
        for two minutes at most: what happened.

        Raises:
            CatalogUnavailable: it does not come back.
        """
        listed, found = self.listed(), {"killed_redis": [self._process.pid], "keys_before": self.keys()}
        self.kill()
        gone = time.monotonic()
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._process = self._start()
        while self.listed() < listed and time.monotonic() < gone + _LISTED_S:
            time.sleep(0.2)
        after = {"redis_after": [self._process.pid], "listed_again": self.listed()}
        return {**found, **after, **self._back(gone)}

    def _back(self, gone: float) -> dict[str, float]:
        self._span = (gone, time.monotonic())
        return {"away_s": self._span[1] - gone}

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def seen_by(self, answers: Sequence[Any]) -> dict[str, Any]:
        """What users saw of it: answers that began and ended while it was away, and why they missed; and how
        long after its return the first token came from an artifact that had served nobody before, so that
        no memory can have had it; None where there was none.

        Args:
            answers: of `traffic_client`, a process of this machine: they have the same clock.

        Raises:
            RuntimeError: nobody was answered while it was away.
        """
        gone, back = self._span
        whole = [one for one in answers if one["end"] == "answered"]
        served = [one for one in whole if gone <= one["began"] and one["began"] + one["seconds"] <= back]
        if not served:
            raise RuntimeError("nobody was answered while Redis was away: more --seconds, or a higher --rate")
        known = {one["xkv"]["artifact"] for one in whole if one["began"] < back} | {None}
        loads = [one for one in whole if one["xkv"]["artifact"] not in known]
        firsts = [one["began"] + one["first_token_s"] - back for one in loads]
        reasons = Counter(one["xkv"]["miss"]["reason"] for one in served if one["xkv"]["miss"])
        return {
            "served_away": len(served),
            "misses_away": dict(reasons),
            "first_load_s": min(firsts, default=None),
        }

    def _start(self) -> subprocess.Popen[bytes]:
        words = ["--bind", "127.0.0.1", "--port", str(self._port), "--appendonly", "yes", "--save", ""]
        process = subprocess.Popen([server_binary(), *words], cwd=self._folder, stdout=subprocess.DEVNULL)
        try:
            self.keys()
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process
