"""The examples as processes and over HTTP: how the tests start them, and talk to them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Running:
    """What the one command brought up: the backend, and the server behind it."""

    url: str
    base_url: str
    docs: Path

    def begin(self, document: str) -> str:
        """The id of a new conversation."""
        talk = httpx.post(f"{self.url}/conversations", json={"document": document}, timeout=120)
        assert talk.status_code == 201 and talk.json()["messages"] == []
        return str(talk.json()["id"])

    def ask(self, name: str, question: str) -> tuple[str, dict[str, Any]]:
        """The text as it was streamed, and the last event."""
        path = f"{self.url}/conversations/{name}/messages"
        with httpx.stream("POST", path, json={"text": question}, timeout=300) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = list(read_events(answer))
        *pieces, (kind, end) = events
        assert kind == "end", end
        assert len(pieces) > 1 and {piece for piece, _ in pieces} == {"text"}
        return "".join(data for _, data in pieces), end

    def messages(self, name: str) -> list[dict[str, str]]:
        """What was said."""
        found: list[dict[str, str]] = httpx.get(f"{self.url}/conversations/{name}", timeout=60).json()[
            "messages"
        ]
        return found


def read_events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def example(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one as a command."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def wait_for_urls(log: Path, backend: subprocess.Popen[bytes]) -> str:
    """The base URL of the server, once the backend says that it is up."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and backend.poll() is None:
        if found := re.search(r"chat at http://\S+ over \S+ at (http://\S+/v1) ", log.read_text()):
            return found[1]
        time.sleep(0.2)
    raise AssertionError(f"the example did not start:\n{log.read_text()}")


def is_taken(browser: httpx.Client, path: str) -> bool:
    with browser.stream("POST", path, json={"text": "Who?"}) as answer:
        return answer.status_code == 200
