"""Bad requests: each gets OpenAI's shape of error, a status that fits, and the name of what was wrong."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from engines import PacedBackend
from pydantic import ValidationError
from rivers import SETTINGS
from serving import Served, serve

from xkv_service.api.app import create_app
from xkv_service.api.model import ServedModel
from xkv_service.api.requests import ChatBody, CompletionBody
from xkv_service.api.settings import APISettings

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as client:
        yield client


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def messages(*contents: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for content in contents]}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 3}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"tools": [FUNCTION]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"temprature": 0}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": ["Hello"]}, "messages.0"),
        (messages(None), "messages.0.content"),
        (messages(None, role="assistant"), "messages.0.content"),
        (messages("hi", role="tool"), "messages.0"),
        (messages("hi", role="owner"), "messages.0.role"),
        (messages([IMAGE]), "messages.0.content"),
        (messages([{"type": "text"}]), "messages.0.content"),
        (messages("well <|end|>"), "messages"),
        (messages("<|system|>", role="system"), "messages"),
        (messages("\ud800"), "messages.0.content"),
        ({"model": "gpt-5"}, "model"),
        ({"model": None}, "model"),
        ({"prefix_id": "../../etc/passwd"}, "prefix_id"),
    ],
)
def test_a_chat_that_is_refused(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    body = json.dumps({**CHAT, **changes})
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/chat/completions", content=body, headers=headers)
    error = error_of(answer, 404 if changes.get("model") else 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
        {"prompt": [0, 300]},
        {"prompt": [-1]},
        {"prompt": [10**30]},
        {"prompt": [True]},
        {"prompt": [1, "a"]},
        {"prompt": {"a": 1}},
        {"prompt": "a <|end|>"},
        {"prompt": "\ud800"},
    ],
)
def test_a_prompt_that_is_refused(http: httpx.Client, changes: dict[str, Any]) -> None:
    body = json.dumps({**TEXT, **changes})
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": [FUNCTION]}, "tools is not supported: leave it out"),
        (
            {"tool_choice": "required"},
            'tool_choice="required" is not supported: leave it out, or use "none" or "auto"',
        ),
        ({"n": 2}, "n=2 is not supported: leave it out, or use 1; send a request for each answer"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": "5"}, 'max_tokens must be an integer, not "5"'),
        ({"temperature": 3}, "temperature must be at most 2, not 3"),
        ({"stream": "yes"}, 'stream must be true or false, not "yes"'),
        ({"stop": 3}, "stop: give a text, or a list of up to 4"),
        ({"stop": ["x" * 300]}, "stop.0 is too long: it may have 256 characters"),
        ({"stop": ["x"] * 5}, "stop is too long: it may have 4 entries"),
        (
            {"prefix_id": "abc"},
            "prefix_id: not the id of a prefix: 64 hexadecimal digits, as /v1/prefixes tells",
        ),
        ({"temprature": 0}, "unknown parameter: temprature (did you mean temperature? Else leave it out)"),
        ({"stream_options": {"usages": True}}, "parameter: stream_options.usages (leave it out)"),
        ({"p" * 5000: 1}, f"unknown parameter: {'p' * 100}... (leave it out)"),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": ["Hello"]}, "messages.0 must be a JSON object"),
        (
            messages("x", role="me"),
            "messages.0.role must be 'system', 'developer', 'user' or 'assistant', not",
        ),
        (messages("x", role="tool"), "messages.0: calls of tools are not supported: leave out such messages"),
        (messages([IMAGE]), "messages.0.content: parts of type 'image_url' are not supported: use text"),
        (messages(["Hello"]), "messages.0.content: part 0 is not of the form"),
        (messages(3), "messages.0.content: give a text, or a list of parts"),
        (
            messages("cut \ud83d"),
            "messages.0.content: this is not Unicode text: \\ud83d is half of a surrogate pair",
        ),
        (messages("a <|end|>"), "of this model's tokenizer (remove it from the text: a message could forge"),
        ({"model": "gpt-5"}, "no model 'gpt-5': use 'tiny' or 'gpt-4o'"),
    ],
)
def test_what_is_wrong_and_what_to_do_is_told(
    http: httpx.Client, changes: dict[str, Any], message: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/chat/completions", content=json.dumps({**CHAT, **changes}), headers=headers)
    assert message in error_of(answer, answer.status_code)["message"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (["a", "b"], "prompt: 2 prompts in one request are not supported: send a request for each"),
        ([1, 1.5], "prompt: entry 1 of the token ids is not an integer"),
        (3, "prompt: give a text, or a list of token ids"),
        ("a <|end|>", "the prompt contains '<|end|>'"),
        ([-1], "token id -1 is not one of the model's, 0 to "),
    ],
)
def test_what_is_wrong_with_a_prompt_is_told(http: httpx.Client, prompt: Any, message: str) -> None:
    answer = http.post("/v1/completions", json={**TEXT, "prompt": prompt})
    assert error_of(answer, 400)["message"].startswith(message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not a JSON object"),
        (b'{"model": "\xff"}', "the body is not text in UTF-8: byte 11 of it is none (send JSON in UTF-8)"),
        (
            b"{'model': 1}",
            "the body is not JSON: Expecting property name enclosed in double quotes at character 1",
        ),
        (b'{"\\ud800": 1}', "unknown parameter: \\ud800 (leave it out)"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "the body has a number of too many digits"),
    ],
)
def test_why_a_body_cannot_be_read_is_told(http: httpx.Client, body: bytes, message: str) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/prefixes"):
        error = error_of(http.post(path, content=body, headers=headers), 400)
        assert error["message"].startswith(message)
        unknown = message.startswith("unknown")
        assert error["code"] == ("unknown_parameter" if unknown else "invalid_json" if body else None)


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [1] * 1000},
        {"messages": [{}] * 1000},
        messages([{"type": "text"}] * 1000),
        {f"p{number}": 1 for number in range(1000)},
    ],
)
def test_a_body_that_is_wrong_a_thousand_times_is_refused_once(changes: dict[str, Any]) -> None:
    """Millions of errors take a minute to tell, in which nobody else is served."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({**CHAT, **changes})
    assert caught.value.error_count() <= 2


@pytest.mark.parametrize("entry", [1.5, "a", [1], ["a"], None])
def test_a_prompt_that_is_wrong_a_thousand_times_is_refused_once(entry: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({**TEXT, "prompt": [entry] * 1000})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("body", "kind"),
    [(json.dumps(CHAT), "text/plain"), ("[1]", "application/json"), ('"a"', "application/json")],
)
def test_a_body_that_is_no_object_is_told_what_to_be(http: httpx.Client, body: str, kind: str) -> None:
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    assert "send one, with the header Content-Type: application/json" in error_of(answer, 400)["message"]


@pytest.mark.parametrize("changes", [{"echo": True}, {"suffix": "end"}, {"best_of": 3}, {"logprobs": 6}])
def test_what_completions_cannot(http: httpx.Client, changes: dict[str, Any]) -> None:
    answer = http.post("/v1/completions", json={**TEXT, **changes})
    assert error_of(answer, 400)["param"] == next(iter(changes))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"model": "tiny", "seed": ' + b"9" * 10_000 + b"}", b'{"model": "tiny", "messages": {"a": "b"}}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/prefixes"):
        error_of(http.post(path, content=body, headers=headers), 400)


def test_addresses_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    error_of(http.get("/v2/chat"), 404)
    error_of(http.get("/v1/models/gpt-5"), 404)
    answer = http.get("/v1/chat/completions")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"
    error_of(http.post("/healthz"), 405)
    error_of(http.post("/v1/prefixes", json={"document": "a"}), 501)


def test_a_namespace_that_is_not_there_without_keys(http: httpx.Client) -> None:
    error = error_of(http.get("/v1/prefixes", params={"namespace": "acme"}), 403)
    told = (
        "without keys this server has only namespaces default and public (start it with --keys to use 'acme')"
    )
    assert (error["message"], error["param"]) == (told, "namespace")


@pytest.mark.parametrize(
    ("method", "path", "allow", "told"),
    [
        ("OPTIONS", "/v1/prefixes/0", "DELETE, GET, PATCH", "DELETE, GET or PATCH"),
        ("PUT", "/v1/prefixes", "GET, POST", "GET or POST"),
        ("POST", "/", "GET", "GET"),
        ("POST", "/v1/models/a/b", "GET", "GET"),
    ],
)
def test_all_methods_of_an_address_are_told(
    http: httpx.Client, method: str, path: str, allow: str, told: str
) -> None:
    answer = http.request(method, path)
    assert error_of(answer, 405)["message"] == f"not allowed: {method} {path} (use {told})"
    assert answer.headers["allow"] == allow


def test_a_prompt_longer_than_the_window(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **messages("word " * 500)})
    error = error_of(answer, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    answer = http.post("/v1/completions", json={**TEXT, "prompt": [70] * 2048})
    error = error_of(answer, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_the_openai_client_raises_its_own_errors(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="n=2 is not supported"):
        client.chat.completions.create(**CHAT, n=2)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{**CHAT, "model": "other"})
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id


def test_bodies_that_are_too_large_are_not_read(served_model: ServedModel, backend: PacedBackend) -> None:
    settings = APISettings(max_body_bytes=10_000)
    with serve(create_app(served_model, backend, settings=settings)) as served, served.http() as http:
        large = json.dumps({**CHAT, **messages("a" * 20_000)})
        headers = {"content-type": "application/json"}
        error = error_of(http.post("/v1/chat/completions", content=large, headers=headers), 413)
        assert error["message"] == "the body is larger than 10,000 bytes: send a shorter one"
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200

        def chunks() -> Iterator[bytes]:  # no length is told before
            for _ in range(2):
                yield b"a" * 6_000

        error_of(http.post("/v1/chat/completions", content=chunks(), headers=headers), 413)


def test_a_body_of_1000_bytes_sent_one_at_a_time_is_not_waited_for(
    served_model: ServedModel, backend: PacedBackend
) -> None:
    settings = APISettings(body_timeout_s=1.0)
    with serve(create_app(served_model, backend, settings=settings)) as served, served.connect() as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n"
        )
        started = time.monotonic()
        slow.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - started < 100:
            slow.sendall(b" ")
            try:
                answer = slow.recv(4096)
            except socket.timeout:  # noqa: UP041 - its own class before Python 3.10's alias
                continue
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < 100  # all of it would have taken 200 s


def test_without_keys_other_machines_are_refused(served: Served, served_model: ServedModel) -> None:
    with served.http() as http:
        error_of(http.get("/v1/models", headers={"host": "rebound.example"}), 403)
        assert http.get("/v1/models", headers={"host": "localhost:80"}).status_code == 200


def test_settings_out_of_range() -> None:
    for name in ("max_body_bytes", "request_timeout_s", "min_match_tokens"):
        with pytest.raises(Exception, match=name):
            APISettings(**{name: 0})
    with pytest.raises(Exception, match="min_fidelity"):
        APISettings(min_fidelity=1.5)
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(Exception, match="queue_timeout_s"):
            APISettings(queue_timeout_s=seconds)
    assert APISettings(queue_timeout_s=0).queue_timeout_s == SETTINGS.min_fidelity == 0
