"""Questions about the example documents, asked as an application would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from httpx import Limits
from openai import DefaultHttpxClient, OpenAI

EXAMPLES = Path(__file__).parents[2] / "examples"


class Asker:
    """Asks a server with OpenAI's client."""

    def __init__(self, url: str) -> None:
        # Longer than a test pauses: a connection that expires while a thread takes it is the client's error.
        patient = DefaultHttpxClient(limits=Limits(keepalive_expiry=80))
        self.client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, http_client=patient)
        self.model = self.client.models.list().data[0].id

    def ask(self, messages: list[dict[str, str]], **options: Any) -> Any:
        settings = {"model": self.model, "max_tokens": 48, "temperature": 0, **options}
        return self.client.chat.completions.create(messages=messages, **settings)


def example_document(name: str) -> tuple[str, list[dict[str, str]]]:
    """The text, and questions about it with the right answers."""
    (path,) = (EXAMPLES / "corpus").glob(f"{name}.*")
    lines = (EXAMPLES / "questions" / f"{name}.questions.jsonl").read_text().splitlines()
    return path.read_text().strip(), [json.loads(line) for line in lines]


def first_turn(document: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def wait_until(met: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)
