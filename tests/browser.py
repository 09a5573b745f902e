"""A headless Chromium that opens one page, over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
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
_START_S = 300.0
_WAIT = """new Promise((done, fail) => {
  const end = Date.now() + 240000;
  const look = () => { const found = %s; if (found) done(found);
    else if (Date.now() > end) fail("not in time"); else setTimeout(look, 50); };
  look();
})"""


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

    def open(self, url: str) -> None:
        """Go to an address, and wait until it is loaded."""
        self._call("Page.navigate", url=url)
        self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of an expression; of a promise, what it comes to."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        done = self._call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression, once it has one that counts as true."""
        return self.evaluate(_WAIT % script)

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
        told = self._until(lambda told: told.get("id") == number)
        assert "error" not in told, told
        result: dict[str, Any] = told["result"]
        return result

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What the browser says next that is wanted; of the rest, problems are kept."""
        while True:
            told: dict[str, Any] = json.loads(self._socket.recv(timeout=300))
            if wanted(told):
                return told
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
        [str(CHROMIUM), *_OPTIONS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
    )
    try:
        with connect(_address(profile), max_size=None, open_timeout=_START_S) as socket:
            page = Page(socket)
            page.open(url)
            yield page
    finally:
        browser.terminate()
        browser.wait(120)


def _address(profile: Path) -> str:
    """Of the page's DevTools, once there is one."""
    port, deadline = profile / "DevToolsActivePort", time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if port.exists() and (number := port.read_text().partition("\n")[0]):
            for target in httpx.get(f"http://127.0.0.1:{number}/json", timeout=30).json():
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("the browser opened no page")
