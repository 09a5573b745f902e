"""Keys: who gets in, what each may have under way, and that namespaces learn nothing of each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from engines import PacedBackend, paced_backend, wait_until
from rivers import DOCUMENT, SETTINGS, key, publish
from serving import Served, serve
from starlette.types import Receive, Scope, Send

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.keys import KEYS_VARIABLE, Key, KeyRing, KeysError, Limits, hash_key
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.modeling.models import LoadedModel

QUESTION = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere does it end?"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 3}
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""What `printf %s "$KEY" | sha256sum` prints where KEY is not set."""

KEYS = KeyRing(
    (
        key("alpha"),
        key("beta"),
        key("boss", operator=True),
        key("few", limits=Limits(requests=2, prompt_tokens=300)),
    )
)


@pytest.fixture(scope="module")
def backend(loaded: LoadedModel, store: ArtifactStore) -> Iterator[PacedBackend]:
    with paced_backend(loaded, store) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(
    served_model: ServedModel, backend: PacedBackend, finder: PrefixFinder, store: ArtifactStore,
    loaded: LoadedModel,
) -> Iterator[Served]:  # fmt: skip
    """A server with keys, over a store with an artifact of alpha's."""
    publish(store, loaded, DOCUMENT, "alpha")
    with serve(create_app(served_model, backend, finder=finder, keys=KEYS, settings=SETTINGS)) as served:
        yield served


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer sk-gamma", "Basic sk-alpha", "sk-alpha", "Bearer sk-alpha x"]
)
def test_without_a_valid_key_nobody_gets_in(guarded: Served, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    with guarded.http() as http:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/prefixes"),
            ("GET", "/metrics"),
            ("GET", "/status"),
            ("GET", "/nothing"),
        ):
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert http.get(path, headers=headers).status_code == 200


def test_the_openapi_document_says_where_a_key_is_needed(guarded: Served) -> None:
    with guarded.http() as http:
        document = http.get("/openapi.json").json()
    assert {"bearer"} == {scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()}
    operations = [(path, one) for path, methods in document["paths"].items() for one in methods.values()]
    assert {path for path, one in operations if "security" not in one} == {"/healthz", "/readyz"}


def test_a_body_without_a_key_is_not_read(guarded: Served) -> None:
    with guarded.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\ncontent-length: 1000000\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 401")


def test_the_openai_client_with_a_key(guarded: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()
    assert guarded.client("sk-alpha").chat.completions.create(**CHAT).xkv["artifact"]


def test_a_namespace_is_served_from_its_own_artifacts_alone(guarded: Served) -> None:
    """The text is the same; what it was computed from is not, and nothing says that there is more."""
    mine = guarded.client("sk-alpha").chat.completions.create(**CHAT)
    theirs = guarded.client("sk-beta").chat.completions.create(**CHAT)
    assert mine.xkv["artifact"] is not None
    assert theirs.xkv["artifact"] is None
    assert theirs.xkv["miss"] == {
        "reason": "no_artifact", "detail": "no stored prefix begins like this prompt",
    }  # fmt: skip
    other = guarded.client("sk-boss").chat.completions.create(
        **CHAT, extra_body={"prefix_id": mine.xkv["artifact"]}
    )
    absent = guarded.client("sk-boss").chat.completions.create(**CHAT, extra_body={"prefix_id": "0" * 64})
    assert other.xkv["artifact"] is None
    assert other.xkv["miss"]["reason"] == absent.xkv["miss"]["reason"] == "evicted"


def test_tails_of_one_namespace_serve_no_other(guarded: Served) -> None:
    question = [{"role": "user", "content": "A conversation of a hundred tokens, and of nobody else. " * 4}]
    for name in ("alpha", "beta"):
        answer = guarded.client(f"sk-{name}").chat.completions.create(**{**CHAT, "messages": question})
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_key_has_so_many_requests_under_way(guarded: Served, backend: PacedBackend) -> None:
    short = {**CHAT, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60}
    client = guarded.client("sk-few")
    asked = backend.asked
    with ThreadPoolExecutor(3) as pool:
        with backend.held():
            answers = [pool.submit(client.chat.completions.create, **short) for _ in range(2)]
            wait_until(lambda: backend.asked == asked + 2)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**short)
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.code == "rate_limit_exceeded"
            answers.append(pool.submit(guarded.client("sk-alpha").chat.completions.create, **CHAT))
            wait_until(lambda: backend.asked == asked + 3)
        assert all(answer.result().choices for answer in answers)
    for _ in range(5):  # places are given back, also by requests that are refused
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**short, "messages": [{"role": "user", "content": "<|end|>"}]})
    assert client.chat.completions.create(**short).choices


def test_a_key_has_so_many_prompt_tokens_under_way(guarded: Served, backend: PacedBackend) -> None:
    client = guarded.client("sk-few")

    def ask(letters: int, tokens: int = 60) -> Any:
        messages = [{"role": "user", "content": "a" * letters}]
        return client.chat.completions.create(**{**CHAT, "messages": messages, "max_tokens": tokens})

    with pytest.raises(openai.BadRequestError, match="may send 300") as caught:
        ask(400)
    assert (caught.value.code, caught.value.param) == ("prompt_too_long", "messages")
    asked = backend.asked
    with ThreadPoolExecutor(1) as pool:
        with backend.held():
            first = pool.submit(ask, 200)
            wait_until(lambda: backend.asked == asked + 1)
            with pytest.raises(openai.RateLimitError, match="300 prompt tokens"):
                ask(150)
        assert first.result().choices
    assert ask(150, 2).choices


def test_only_operators_see_all_namespaces(guarded: Served) -> None:
    guarded.client("sk-beta").chat.completions.create(**CHAT)
    with guarded.http("sk-beta") as http:
        assert http.get("/metrics").status_code == 403
        own = http.get("/status").json()
    with guarded.http("sk-boss") as http:
        assert "xkv_requests_total" in http.get("/metrics").text
        every = http.get("/status").json()
    assert own["engine"] is None and every["engine"]["engines"] == 1
    assert own["namespace"] == "beta"
    assert 0 < own["traffic"]["requests"] < every["traffic"]["requests"]
    assert own["traffic"]["hits"] == 0 < every["traffic"]["hits"]


def test_a_keys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    content = {"keys": [{"name": "a", "sha256": hash_key("secret"), "namespace": "team-a"}]}
    path.write_text(json.dumps(content))
    ring = KeyRing.read(path)
    found = ring.find("bearer secret")
    assert found is not None and found.namespace == "team-a"
    assert not found.write_public and not found.operator
    assert ring.find("Bearer other") is None
    monkeypatch.setenv(KEYS_VARIABLE, json.dumps(content))
    assert KeyRing.read().keys == ring.keys
    monkeypatch.delenv(KEYS_VARIABLE)
    assert KeyRing.read().is_open


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "keys.json is not JSON: EOF while parsing an object at line 1 column 1$"),
        ("[]", "keys.json must be a JSON object$"),
        ("{}", "keys.json: keys is missing$"),
        ('{"keys": []}', "keys.json: keys is too short: it needs 1 or more entries$"),
        ('{"keys": {}}', "keys.json: keys must be a list$"),
        ({"key": "plain"}, "keys.json: keys.0.key is unknown: leave it out$"),
        ({"sha256": "abc"}, "keys.0.sha256: not 64 hexadecimal digits, as `printf"),
        ({"sha256": "0" * 64 + "\n"}, "keys.0.sha256: not 64"),
        ({"sha256": EMPTY}, "keys.json: the sha256 of key a is the digest of an empty key$"),
        ({"namespace": ".."}, "keys.0.namespace: namespace '..' is not allowed: use 1 to 64 letters"),
        ({"name": "a b"}, "keys.0.name: a name is 1 to 64 letters, digits, dots, dashes and underscores$"),
        ({"operator": "often"}, "keys.0.operator must be true or false$"),
        ({"limits": {"requests": 0}}, "keys.0.limits.requests must be at least 1$"),
        ("\ud800".encode("utf-8", "surrogatepass"), "cannot be read"),
    ],
)
def test_a_keys_file_that_is_none(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "keys.json"
    good = {"name": "a", "sha256": "0" * 64, "namespace": "a"}
    if isinstance(content, dict):
        content = json.dumps({"keys": [{**good, **content}]})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeysError, match=message) as caught:
        KeyRing.read(path)
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "bearer \t "])
def test_an_empty_key_is_none_whoever_holds_its_digest(header: str | None) -> None:
    assert KeyRing((Key(name="a", sha256=EMPTY, namespace="a"),)).find(header) is None


def test_keys_that_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    one = {"name": "a", "sha256": "0" * 64, "namespace": "a"}
    for other, what in (({"name": "b"}, "sha256"), ({"sha256": "1" * 64}, "name")):
        path.write_text(json.dumps({"keys": [one, {**one, **other}]}))
        with pytest.raises(KeysError, match=f"same {what}"):
            KeyRing.read(path)
    with pytest.raises(KeysError, match="cannot be read: No such file") as caught:
        KeyRing.read(tmp_path / "absent")
    assert "may read" in caught.value.hint


def test_without_keys_other_machines_may_be_served_when_that_is_asked_for(
    served_model: ServedModel, backend: PacedBackend
) -> None:
    settings = replace(SETTINGS, open_network=True)
    with serve(create_app(served_model, backend, settings=settings)) as served, served.http() as http:
        assert http.get("/v1/models", headers={"host": "elsewhere.example"}).status_code == 200


@pytest.mark.parametrize(("published", "seen"), [(None, 403), ("127.0.0.1", 200)])
def test_by_a_published_port_requests_are_this_machines_if_they_name_it(
    served_model: ServedModel, backend: PacedBackend, published: str | None, seen: int
) -> None:
    app = create_app(served_model, backend, settings=replace(SETTINGS, published=published))

    async def by_a_bridge(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "client": ("172.18.0.1", 4711)}, receive, send)

    with serve(by_a_bridge) as served, served.http() as http:
        for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
            assert http.get("/v1/models", headers={"host": host}).status_code == seen
        for host in ("elsewhere.example", "172.18.0.2:8000", "192.168.1.5"):
            assert http.get("/v1/models", headers={"host": host}).status_code == 403
