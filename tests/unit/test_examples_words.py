"""What the examples say of an answer, and of a refusal."""

from __future__ import annotations

import httpx
import openai
import pytest

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
