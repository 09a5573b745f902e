"""What the examples say of an answer, and of a server that does not start."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import openai
import pytest

from examples import local_server
from examples.answers import Answer
from examples.connection import told
from examples.rag.__main__ import _show


@pytest.mark.parametrize(
    ("artifact", "cached", "miss", "source"),
    [
        ("ab" * 32, 1200, None, "stored prefix abababababab"),
        (None, 1200, "kept_tail: computed without it", "a kept turn; kept_tail: computed without it"),
        (None, 0, "no_artifact: none", "computed; no_artifact: none"),
    ],
)
def test_rag_says_what_served_an_answer(
    capsys: pytest.CaptureFixture[str], artifact: str | None, cached: int, miss: str | None, source: str
) -> None:
    _show("asked", Answer("Yes.", artifact, 0, cached, 1300, miss, 0.25))
    said = f"  asked: first text after 0.25 s, {cached} of 1300 prompt tokens cached ({source})\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(400, json={"error": {"message": "n=2 is not supported"}}), "n=2 is not supported"),
        (httpx.Response(502, text="Bad gateway"), "Bad gateway"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(answer: httpx.Response, said: str) -> None:
    http = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
    client = openai.OpenAI(base_url="http://server/v1", api_key="-", max_retries=0, http_client=http)
    with pytest.raises(openai.APIError) as caught:
        client.models.list()
    assert told(caught.value) == said


@pytest.mark.parametrize(("status", "expected"), [(0, ""), (3, "why it failed")])
def test_a_servers_words_are_shown_where_it_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int,
    expected: str,
) -> None:  # fmt: skip
    says = f"import sys; print('why it failed', file=sys.stderr); sys.exit({status})"
    commands = {"precompute": "pass", "serve": says}
    monkeypatch.setattr(local_server, "_xkv", lambda name, *_: [sys.executable, "-c", commands[name]])
    with pytest.raises(SystemExit) as ended, local_server.local_server(tmp_path, tmp_path):
        pass
    assert ended.value.code == (status or 1)
    assert capsys.readouterr().err.strip() == expected
