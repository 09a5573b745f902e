"""A headless Chromium that opens one page, over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-port=0",
)
_START_S = 60.0


class Page:
    """A page that is open.

    Args:
        socket: to its DevTools.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count()
        self.problems: list[str] = []
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def evaluate(self, script: str) -> Any:
        """The value of an expression; of a promise, what it comes to."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        done = self._call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        """As if the screen had so many pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def picture(self, path: Path) -> None:
        """A PNG of what is seen."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=120))
            if told.get("id") == number:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result
            self._note(told)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what the browser's console would show in red."""
        level = event["params"].get("entry", {}).get("level")
        if event["method"] == "Runtime.exceptionThrown" or level == "error":
            self.problems.append(json.dumps(event["params"]))


@contextmanager
def browse(url: str, profile: Path) -> Iterator[Page]:
    """A browser at an address, until the block ends.

    Args:
        profile: an empty folder that is its own.
    """
    browser = subprocess.Popen(
        [str(CHROMIUM), *_OPTIONS, f"--user-data-dir={profile}", url], stderr=subprocess.DEVNULL
    )
    try:
        with connect(_address(profile, url), max_size=None) as socket:
            yield Page(socket)
    finally:
        browser.terminate()
        browser.wait(30)


def _address(profile: Path, url: str) -> str:
    """Of the page's DevTools, once there is one."""
    port, deadline = profile / "DevToolsActivePort", time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if port.exists() and (number := port.read_text().partition("\n")[0]):
            for target in httpx.get(f"http://127.0.0.1:{number}/json", timeout=30).json():
                if target["type"] == "page" and target["url"].startswith(url):
                    return str(target["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("the browser opened no page")
