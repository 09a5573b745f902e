"""Answers to OpenAI's own client: what they say, that a stream says the same, and what served them."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest
from engines import PacedBackend
from openai import OpenAI
from rivers import DOCUMENT
from serving import Served, serve

from xkv_artifacts.manifest import PrefixManifest
from xkv_service.api.answers import ChatChunk, ChatCompletion, Completion
from xkv_service.api.app import create_app
from xkv_service.api.model import ServedModel
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.exact import exact_cache
from xkv_service.sessions.session import Session
from xkv_service.sessions.settings import GenerationSettings

QUESTION = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere does it end?"}]
OTHER = [{"role": "user", "content": "Tell me of something else than rivers."}]


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    return served.client()


def ask(client: OpenAI, messages: Any = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **options}
    )


def joined(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_a_chat_is_answered_from_its_stored_prefix(client: OpenAI, stored: PrefixManifest) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=12
    )
    answer = raw.parse()
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert answer.xkv == {
        "artifact": stored.id, "prefix_tokens": stored.tokens, "cached_tokens": cached,
        "part": None, "miss": None,
    }  # fmt: skip
    assert stored.tokens <= cached < answer.usage.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert raw.headers["x-xkv-artifact"] == stored.id
    assert "x-xkv-miss" not in raw.headers
    assert raw.headers["x-request-id"] == answer.id.removeprefix("chatcmpl-")


def test_the_text_is_what_a_session_says(client: OpenAI, loaded: LoadedModel, stored: PrefixManifest) -> None:
    messages = [{"role": "user", "content": "Count to ten, please."}]
    session = Session(
        loaded.model, loaded.tokenizer, exact_cache(loaded.model, [2]), prefix_ids=[2]
    )  # the template's <|user|>
    expected = session.send("Count to ten, please.", GenerationSettings(max_new_tokens=12))
    answer = ask(client, messages)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish
    assert answer.usage.completion_tokens == expected.generated_tokens
    assert answer.usage.prompt_tokens == expected.prompt_tokens


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_what_the_whole_answer_says(
    client: OpenAI, stored: PrefixManifest, usage: bool
) -> None:
    whole = ask(client)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    text, chunks = joined(ask(client, stream=True, **options))
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == whole.choices[0].finish_reason
    assert set(finishes[:-1]) == {None}
    assert chunks[-1].xkv["artifact"] == stored.id
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == (whole.usage if usage else None)


def test_a_prompt_that_nothing_is_stored_of_says_why(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=OTHER, max_tokens=2)
    assert raw.headers["x-xkv-miss"] == "no_artifact"
    assert raw.parse().xkv["artifact"] is None
    assert raw.parse().usage.prompt_tokens_details.cached_tokens == 0


def test_a_part_of_a_stored_prefix_serves_too(client: OpenAI, stored: PrefixManifest) -> None:
    changed = [{"role": "user", "content": DOCUMENT[:100] + "But that was long ago."}]
    xkv = ask(client, changed).xkv
    assert xkv["artifact"] == stored.id
    assert 64 <= xkv["prefix_tokens"] < stored.tokens
    assert xkv["miss"]["reason"] == "diverges"
    assert f"share {xkv['prefix_tokens']} of its {stored.tokens} tokens" in xkv["miss"]["detail"]


def test_logprobs_of_a_chat(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy
        assert len(entry.top_logprobs) == 3
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    _, chunks = joined(ask(client, logprobs=True, top_logprobs=3, max_tokens=5, stream=True))
    streamed = [e for c in chunks for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert [(e.token, e.logprob) for e in streamed] == [(e.token, e.logprob) for e in entries]


def test_a_completion_from_text_and_from_token_ids(client: OpenAI, loaded: LoadedModel) -> None:
    ids = loaded.tokenizer("Once upon a time").input_ids
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    of_text = client.completions.create(prompt="Once upon a time", **options)
    of_ids = client.completions.create(prompt=ids, **options)
    of_list = client.completions.create(prompt=["Once upon a time"], **options)
    assert of_text.choices == of_ids.choices == of_list.choices
    assert of_text.usage.prompt_tokens == len(ids)
    logprobs = of_text.choices[0].logprobs
    assert len(logprobs.tokens) == of_text.usage.completion_tokens
    assert logprobs.text_offset == [
        sum(len(token) for token in logprobs.tokens[:at]) for at in range(len(logprobs.tokens))
    ]
    assert all(math.isclose(max(top.values()), chosen) for top, chosen in
               zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True))  # fmt: skip
    chunks = list(client.completions.create(prompt=ids, stream=True, **options))
    assert "".join(c.choices[0].text for c in chunks) == of_text.choices[0].text
    assert chunks[-1].choices[0].finish_reason == of_text.choices[0].finish_reason


def test_the_seed_decides_what_is_sampled(client: OpenAI) -> None:
    def text(seed: int) -> str:
        answer = ask(client, OTHER, temperature=1.5, seed=seed, max_tokens=24)
        return str(answer.choices[0].message.content)

    assert text(7) == text(7)
    assert len({text(seed) for seed in (1, 2, -3)}) == 3


def test_stop_texts_end_an_answer_and_are_not_part_of_it(client: OpenAI) -> None:
    whole = ask(client, max_tokens=16).choices[0].message.content
    stop = whole[4:6]
    for given in (stop, [stop, "never said"]):
        answer = ask(client, max_tokens=16, stop=given)
        assert answer.choices[0].message.content == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"


def test_parts_of_text_and_other_names_of_the_model(client: OpenAI) -> None:
    parts = [{"type": "text", "text": DOCUMENT}, {"type": "text", "text": "\n\nWhere does it end?"}]
    answer = ask(client, [{"role": "user", "content": parts}], model="gpt-4o")
    assert answer.choices == ask(client).choices
    assert (answer.model, ask(client).model) == ("gpt-4o", "tiny"), "the name that was asked for"
    text = client.completions.create(model="gpt-4o", prompt="Hello", max_tokens=1)
    chunks = [*ask(client, model="gpt-4o", stream=True)]
    assert {text.model, *(chunk.model for chunk in chunks)} == {"gpt-4o"}
    developer = [{"role": "developer", "content": "Be brief."}, *OTHER]
    system = [{"role": "system", "content": "Be brief."}, *OTHER]
    assert ask(client, developer).choices == ask(client, system).choices


def test_parameters_that_ask_for_nothing_are_accepted(client: OpenAI) -> None:
    answer = ask(
        client,
        n=1,
        user="somebody",
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        max_tokens=None,
        max_completion_tokens=3,
        stop=None,
        seed=None,
    )
    assert answer.usage.completion_tokens == 3


def test_an_answer_ends_where_the_window_does(client: OpenAI) -> None:
    long = [{"role": "user", "content": "word " * 405}]
    answer = ask(client, long, max_tokens=4000, logprobs=True)
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == 2048
    assert answer.usage.total_tokens <= 2048


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-4o"]
    assert client.models.retrieve("gpt-4o").context_window == 2048


def test_answers_are_as_the_openapi_document_says(served: Served) -> None:
    with served.http() as http:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 3, "logprobs": True}
        ChatCompletion.model_validate_json(http.post("/v1/chat/completions", json=body).content, strict=True)
        text = http.post("/v1/chat/completions", json={**body, "stream": True}).text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        for line in lines:
            ChatChunk.model_validate_json(line, strict=True)
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 3}
        Completion.model_validate_json(http.post("/v1/completions", json=body).content, strict=True)
        document = http.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["operationId"] == "create_chat_completion"
    assert set(chat["responses"]) == {"200", "4XX", "5XX"}
    assert "security" not in chat and "securitySchemes" not in document["components"], "there are no keys"


def test_a_request_id_of_the_clients_own(served: Served) -> None:
    with served.http() as http:
        assert http.get("/healthz", headers={"x-request-id": "a.b-c_1"}).headers["x-request-id"] == "a.b-c_1"
        for bad in ("a b", "x" * 129, "<script>"):
            given = http.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
            assert given.startswith("req-")


def test_a_request_id_that_a_proxy_sends_back_is_not_sent_twice(
    served_model: ServedModel, backend: PacedBackend
) -> None:
    with serve(create_app(served_model, backend, ids_sent=True)) as served, served.http() as http:
        for given in ("mine", "a b"):
            assert "x-request-id" not in http.get("/healthz", headers={"x-request-id": given}).headers


def test_requests_side_by_side(served: Served, backend: PacedBackend) -> None:
    from concurrent.futures import ThreadPoolExecutor

    client = served.client()
    alone = [ask(client, m).choices[0].message.content for m in (QUESTION, OTHER)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda m: ask(client, m).choices[0].message.content, [QUESTION, OTHER] * 4))
    assert found == alone * 4


def test_a_stream_begins_before_the_answer_is_whole(served: Served, backend: PacedBackend) -> None:
    backend.step_s = 0.05
    try:
        with served.http() as http:
            body = {"model": "tiny", "messages": OTHER, "stream": True, "max_tokens": 20, "temperature": 0}
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                before = backend.steps
                lines = answer.iter_lines()
                next(lines)
                first = backend.steps
                for _ in lines:
                    pass
        assert first - before < 10 < backend.steps - before
    finally:
        backend.step_s = 0.0
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "ok"}
