"""/v1/prefixes over a real store and model: made, used, listed, kept and deleted."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import paced_backend
from openai import BaseModel, OpenAI
from openai.pagination import SyncCursorPage
from pydantic import ValidationError
from rivers import DOCUMENT, SETTINGS, key
from serving import Served, serve

from xkv_artifacts.jobs import Job
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.prefix_routes import PrefixBody
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.errors import InvalidSpec
from xkv_service.modeling.models import LoadedModel
from xkv_service.spec import MOST_RATIO

KEYS = KeyRing(
    (
        key("alpha"),
        key("beta"),
        key("editor", write_public=True),
        key("operator", operator=True),
        key("reader", namespace="public"),
        key("writer", namespace="public", write_public=True),
    )
)
SYSTEM = "You answer questions about rivers, and about nothing else, in one short sentence. " * 2
Keeping = tuple[Served, ArtifactStore]


@pytest.fixture(scope="module")
def keeping(
    tmp_path_factory: pytest.TempPathFactory, loaded: LoadedModel, served_model: ServedModel
) -> Iterator[Keeping]:
    """A server that keeps prefixes, each key in a namespace of its own."""
    folder = str(tmp_path_factory.mktemp("kept"))
    with ArtifactStore.open(folder, patience_s=0) as store:
        maker = PrefixMaker(store, loaded, ratio=2.0, most_waiting=12)
        finder = PrefixFinder(store, loaded.identity, SETTINGS)
        try:
            with paced_backend(loaded, store) as backend:
                prefixes = StoredPrefixes(store, maker)
                app = create_app(
                    served_model, backend, finder=finder, prefixes=prefixes, keys=KEYS, settings=SETTINGS
                )
                with serve(app) as served:
                    yield served, store
        finally:
            maker.close()


@pytest.fixture
def alpha(keeping: Keeping) -> Iterator[httpx.Client]:
    with keeping[0].http("sk-alpha") as client:
        yield client


@pytest.fixture
def beta(keeping: Keeping) -> Iterator[httpx.Client]:
    with keeping[0].http("sk-beta") as client:
        yield client


@pytest.fixture
def editor(keeping: Keeping) -> Iterator[httpx.Client]:
    with keeping[0].http("sk-editor") as client:
        yield client


def make(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """Create a prefix and wait until it is made, or failed."""
    answer = http.post("/v1/prefixes", json=body)
    assert answer.status_code == 202, answer.text
    made = answer.json()
    end = time.monotonic() + 240
    while made["status"] in ("queued", "running") and time.monotonic() < end:
        time.sleep(0.05)
        made = http.get(f"/v1/prefixes/{made['id']}").json()
    return made


def chat(http: httpx.Client, *messages: tuple[str, str], **options: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": r, "content": c} for r, c in messages], "max_tokens": 2}
    return http.post("/v1/chat/completions", json={**body, **options})


def test_a_document_is_made_and_serves_chats_about_it(alpha: httpx.Client) -> None:
    made = make(alpha, document=DOCUMENT, system_prompt="Be brief.", name="rivers", ttl="1h", pin=True)
    assert made["status"] == "ready", made
    assert (made["object"], made["name"], made["namespace"], made["model"]) == (
        "prefix",
        "rivers",
        "alpha",
        "tiny",
    )
    assert made["pinned"] and abs(made["expires_at"] - time.time() - 3600) < 60
    assert made["ratio"] > 1 and made["bytes"] > 0 and 0 <= made["fidelity"] <= 1
    assert made["kl"] >= 0 and made["kl_limit"] is None, "without a calibration there is none"
    question = (("system", "Be brief."), ("user", f"{DOCUMENT}\n\nWhere does it end?"))
    for options in ({}, {"prefix_id": made["id"]}):
        xkv = chat(alpha, *question, **options).json()["xkv"]
        assert (xkv["artifact"], xkv["prefix_tokens"], xkv["miss"]) == (made["id"], made["tokens"], None)
    refused = chat(alpha, ("user", "What else?"), prefix_id=made["id"])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "prefix_mismatch"


def test_messages_are_made_and_serve_what_goes_on_from_them(alpha: httpx.Client) -> None:
    system = {"role": "system", "content": SYSTEM}
    made = make(alpha, messages=[system])
    assert made["status"] == "ready", made
    for question in ("Where?", " 1", "漢"):
        xkv = chat(alpha, ("system", SYSTEM), ("user", question)).json()["xkv"]
        assert (xkv["artifact"], xkv["prefix_tokens"]) == (made["id"], made["tokens"])
    asked = make(alpha, messages=[system, {"role": "user", "content": "What is the longest one of all?"}])
    xkv = chat(alpha, ("system", SYSTEM), ("user", "What is the longest one of all?")).json()["xkv"]
    assert xkv["artifact"] == asked["id"]
    assert xkv["prefix_tokens"] >= asked["tokens"] - 1


def test_a_text_is_made_and_serves_completions(alpha: httpx.Client) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 2
    made = make(alpha, text=text)
    body = {"model": "tiny", "prompt": f"{text} It was", "max_tokens": 2, "prefix_id": made["id"]}
    xkv = alpha.post("/v1/completions", json=body).json()["xkv"]
    assert (xkv["artifact"], xkv["prefix_tokens"], xkv["miss"]) == (made["id"], made["tokens"], None)


def test_the_same_prefix_is_made_once(alpha: httpx.Client) -> None:
    first = make(alpha, document=DOCUMENT * 2)
    again = alpha.post("/v1/prefixes", json={"document": DOCUMENT * 2, "pin": True}).json()
    assert again["id"] == first["id"]
    assert again["status"] == "ready" and again["pinned"]
    assert again["created_at"] == first["created_at"]
    other = make(alpha, document=DOCUMENT * 2, ratio=3.0)
    assert other["id"] != first["id"]


def test_changes(alpha: httpx.Client, keeping: Keeping) -> None:
    made = make(alpha, document=DOCUMENT * 3)
    path = f"/v1/prefixes/{made['id']}"
    assert made["expires_at"] is None and not made["pinned"]
    changed = alpha.patch(path, json={"ttl": 100, "pin": True}).json()
    assert changed["pinned"] and abs(changed["expires_at"] - time.time() - 100) < 30
    assert alpha.patch(path, json={}).json() == changed
    assert alpha.patch(path, json={"pin": False}).json()["expires_at"] == changed["expires_at"]
    for ttl, seconds in (("15m", 900), ("300s", 300), ("60", 60), ("1.5h", 5400), (7.5, 7.5)):
        ends = alpha.patch(path, json={"ttl": ttl}).json()["expires_at"]
        assert abs(ends - time.time() - seconds) < 5, ttl
    assert alpha.patch(path, json={"ttl": None}).json()["expires_at"] is None
    for bad in (
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": "-1s"},
        {"ttl": ["1h"]},
        {"pin": "yes"},
        {"namespace": "beta"},
    ):
        assert alpha.patch(path, json=bad).status_code == 400
    assert alpha.delete(path).json() == {"id": made["id"], "object": "prefix", "deleted": True}
    assert alpha.get(path).status_code == alpha.delete(path).status_code == 404
    assert keeping[1].get(made["id"]) is None


def test_a_prefix_that_is_not_ready_has_no_end_yet(alpha: httpx.Client, keeping: Keeping) -> None:
    jobs = keeping[1].jobs
    job = Job(
        id="e" * 64, namespace="alpha", status="queued", model="m", tokens=9, name="n", created=1, ttl_s=3600
    )
    assert jobs.add(job)
    path = f"/v1/prefixes/{job.id}"
    for status in ("queued", "failed"):
        found = alpha.get(path).json()
        assert (found["status"], found["expires_at"]) == (status, None)
        assert found in alpha.get("/v1/prefixes").json()["data"]
        assert alpha.patch(path, json={"ttl": 60}).json() == found
        jobs.fail(job, "it was not to be")
    assert jobs.remove("alpha", job.id)


def test_a_prefix_whose_time_is_over_is_gone(alpha: httpx.Client) -> None:
    made = make(alpha, document=DOCUMENT * 4)
    path = f"/v1/prefixes/{made['id']}"
    alpha.patch(path, json={"ttl": 0.3})
    time.sleep(0.5)
    assert alpha.get(path).status_code == 404
    answer = chat(alpha, ("user", f"{DOCUMENT * 4}\n\nWhere?"), prefix_id=made["id"]).json()
    assert answer["xkv"]["miss"]["reason"] == "evicted"
    assert answer["xkv"]["artifact"] != made["id"]


class Named(BaseModel):
    id: str


def all_ids(client: httpx.Client, limit: int) -> list[str]:
    """Of every prefix, as OpenAI's client goes through pages of anything."""
    openai = OpenAI(base_url=f"{client.base_url}/v1", api_key="sk-beta", max_retries=0)
    options: Any = {"params": {"limit": limit}}
    pages = openai.get_api_list("/prefixes", page=SyncCursorPage[Named], model=Named, options=options)
    return [one.id for one in pages]


def test_pages(beta: httpx.Client, keeping: Keeping) -> None:
    made = [make(beta, document=f"Number {number}. {DOCUMENT}")["id"] for number in range(5)]
    for number in (7, 8, 9):
        job = Job(
            id=f"{number:064x}", namespace="beta", status="queued", model="m", tokens=9, name="n", created=1
        )
        assert keeping[1].jobs.add(job)
    waiting = [f"{number:064x}" for number in (9, 8, 7)]
    expected = [*waiting, *reversed(made)]
    for limit in (1, 2, 3, 4, 8, 9):
        seen, after = [], None
        while True:
            query = {"limit": limit} | ({"after": after} if after else {})
            page = beta.get("/v1/prefixes", params=query).json()
            ids = [one["id"] for one in page["data"]]
            assert 0 < len(ids) <= limit and (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
            seen += ids
            after = page["last_id"]
            if not page["has_more"]:
                break
        assert seen == expected
        assert all_ids(beta, limit) == expected
    assert beta.get("/v1/prefixes", params={"after": expected[-1]}).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
    }  # fmt: skip
    for name in waiting:
        keeping[1].jobs.remove("beta", name)


def test_pages_leave_out_what_has_ended(beta: httpx.Client) -> None:
    kept, *ended = [make(beta, document=f"Ends {number}. {DOCUMENT}")["id"] for number in range(4)]
    for name in ended:
        beta.patch(f"/v1/prefixes/{name}", json={"ttl": 0.2})
    time.sleep(0.4)
    assert beta.get("/v1/prefixes", params={"limit": 1}).json()["last_id"] == kept


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"after": "what?"}, "no prefix 'what?' in the list"),
        ({"after": "0" * 64}, "in the list to go on after"),
        ({"after": ""}, "no prefix '' in the list"),
        ({"after": "x" * 65}, "after"),
        ({"namespace": ""}, "may not read namespace ''"),
        ({"namespace": "alpha"}, "may not read namespace 'alpha'"),
    ],
)
def test_a_page_that_there_is_not_is_refused_in_one_line(
    beta: httpx.Client, query: dict[str, Any], said: str
) -> None:
    answer = beta.get("/v1/prefixes", params=query)
    assert answer.status_code == (403 if "namespace" in query else 400)
    error = answer.json()["error"]
    assert said in error["message"] and "\n" not in error["message"]
    assert [error["param"]] == list(query)


def test_a_prefix_of_another_namespace_is_no_place_to_go_on_after(
    alpha: httpx.Client, beta: httpx.Client
) -> None:
    theirs = make(alpha, document=f"Theirs. {DOCUMENT}")["id"]
    answers = [beta.get("/v1/prefixes", params={"after": name}) for name in (theirs, "0" * 64)]
    assert {answer.status_code for answer in answers} == {400}
    assert answers[0].text.replace(theirs, "") == answers[1].text.replace("0" * 64, "")


def test_namespaces_are_closed_to_each_other(alpha: httpx.Client, beta: httpx.Client) -> None:
    made = make(alpha, document=f"Secret. {DOCUMENT}")
    path = f"/v1/prefixes/{made['id']}"
    absent = "/v1/prefixes/" + "0" * 64
    for method, body in (("GET", None), ("DELETE", None), ("PATCH", {"pin": True})):
        theirs, none = (beta.request(method, where, json=body) for where in (path, absent))
        assert theirs.status_code == none.status_code == 404
        assert theirs.text.replace(made["id"], "") == none.text.replace("0" * 64, "")
    assert made["id"] not in beta.get("/v1/prefixes").text
    assert beta.get("/v1/prefixes", params={"namespace": "alpha"}).status_code == 403
    assert beta.post("/v1/prefixes", json={"document": DOCUMENT, "namespace": "alpha"}).status_code == 403
    assert made["id"] not in beta.get("/status").text
    assert made["id"] in alpha.get("/status").text
    own = make(beta, document=f"Secret. {DOCUMENT}")
    assert own["id"] != made["id"]  # it is made again, for them alone
    assert alpha.get(path).json()["id"] == made["id"]


def test_the_public_namespace(alpha: httpx.Client, editor: httpx.Client) -> None:
    assert alpha.post("/v1/prefixes", json={"document": DOCUMENT, "namespace": "public"}).status_code == 403
    text = f"For everybody. {DOCUMENT}"
    made = make(editor, document=text, namespace="public")
    assert made["namespace"] == "public"
    path = f"/v1/prefixes/{made['id']}"
    assert alpha.get(path).json() == made
    assert [
        one["id"] for one in alpha.get("/v1/prefixes", params={"namespace": "public"}).json()["data"]
    ] == [made["id"]]
    assert chat(alpha, ("user", f"{text}\n\nWhere?")).json()["xkv"]["artifact"] == made["id"]
    assert alpha.delete(path).status_code == alpha.patch(path, json={"pin": True}).status_code == 403
    assert editor.delete(path).json()["deleted"]


def test_a_key_of_the_public_namespace_needs_write_public_too(keeping: Keeping, editor: httpx.Client) -> None:
    made = make(editor, document=f"For all to read. {DOCUMENT}", namespace="public")
    path, absent = f"/v1/prefixes/{made['id']}", "/v1/prefixes/" + "0" * 64
    with keeping[0].http("sk-reader") as reader, keeping[0].http("sk-writer") as writer:
        refused = reader.post("/v1/prefixes", json={"document": DOCUMENT})
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            403,
            "this key may not write to namespace 'public': it may write to none",
        )
        for method, body in (("PATCH", {"pin": True}), ("DELETE", None)):
            answer = reader.request(method, path, json=body)
            assert answer.status_code == 403
            assert "may not change prefixes of namespace 'public'" in answer.json()["error"]["message"]
            assert reader.request(method, absent, json=body).status_code == 404
        assert reader.get(path).json() == made
        assert made["id"] in reader.get("/v1/prefixes").text
        assert make(writer, document=f"For all to read, too. {DOCUMENT}")["namespace"] == "public"
        assert writer.patch(path, json={"pin": True}).json()["pinned"]
        assert writer.delete(path).json()["deleted"]


def test_what_is_null_is_left_out_and_what_is_empty_is_not(alpha: httpx.Client) -> None:
    nulls = dict.fromkeys(("messages", "text", "system_prompt", "name", "ttl", "pin", "namespace"))
    made = alpha.post("/v1/prefixes", json={**nulls, "document": f"Null. {DOCUMENT}"})
    assert (made.status_code, made.json()["namespace"], made.json()["pinned"]) == (202, "alpha", False)
    empty = alpha.post("/v1/prefixes", json={"document": DOCUMENT, "namespace": ""})
    assert (empty.status_code, empty.json()["error"]["param"]) == (403, "namespace")
    assert empty.json()["error"]["message"] == "this key may not write to namespace '': it may write to alpha"


@pytest.mark.parametrize(("name", "meant"), [("ttl_s", "ttl"), ("pinned", "pin"), ("documents", "document")])
def test_a_name_that_is_nearly_right_is_corrected(alpha: httpx.Client, name: str, meant: str) -> None:
    error = alpha.post("/v1/prefixes", json={"document": DOCUMENT, name: 60}).json()["error"]
    assert error["message"] == f"unknown parameter: {name} (did you mean {meant}? Else leave it out)"
    assert (error["param"], error["code"]) == (name, "unknown_parameter")


def test_a_prefix_too_short_is_refused_in_plain_words(alpha: httpx.Client) -> None:
    message = alpha.post("/v1/prefixes", json={"document": "Too short."}).json()["error"]["message"]
    assert re.fullmatch(
        r"\d+ tokens are too few for any ratio: compressed as far as they can be, they take [0-9.]+ times "
        r"the bytes of their exact cache \(give a longer text, or join short documents\)",
        message,
    )


def test_a_quota(beta: httpx.Client, keeping: Keeping, caplog: pytest.LogCaptureFixture) -> None:
    """Room is made where it can be; else it is said at once."""
    store = keeping[1]
    limits = Path(store.blobs.url) / "limits.json"
    limits.write_text('{"namespaces": {"beta": {"artifacts": 1}}}')
    try:
        first = make(beta, document=f"First. {DOCUMENT}")
        second = make(beta, document=f"Second. {DOCUMENT}", pin=True)
        assert second["status"] == "ready" and store.get(first["id"]) is None
        refused = beta.post("/v1/prefixes", json={"document": f"Third. {DOCUMENT}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota_exceeded")
        assert refused.json()["error"]["message"].startswith("namespace beta may hold 1 artifacts")
        assert [one["id"] for one in beta.get("/v1/prefixes").json()["data"]] == [second["id"]]
        limits.write_text('{"namespaces": ')
        with caplog.at_level("ERROR"):
            broken = beta.post("/v1/prefixes", json={"document": f"Third. {DOCUMENT}"})
        assert (broken.status_code, broken.json()["error"]["code"]) == (503, "store_misconfigured")
        assert broken.json()["error"]["message"].startswith(
            "the file of limits of this server's store cannot"
        )
        assert f"{limits}: the file: Invalid JSON" in caplog.text, "what is wrong with it is in the log"
    finally:
        limits.unlink()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"document": DOCUMENT, "text": DOCUMENT}, None),
        ({"document": " "}, "document"),
        ({"document": f"{DOCUMENT}<|end|>"}, "document"),
        ({"document": "a" * 3000}, "document"),
        ({"document": "\\ud800"}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "<|end|>"}]}, "messages"),
        ({"text": ""}, "text"),
        ({"text": DOCUMENT, "system_prompt": "Be brief."}, "system_prompt"),
        ({"document": DOCUMENT, "ratio": 0.5}, "ratio"),
        ({"document": DOCUMENT, "ratio": 200.0}, "ratio"),
        ({"document": "Too short."}, "document"),
        ({"text": "Too short."}, "text"),
        ({"document": DOCUMENT, "ttl": 0}, "ttl"),
        ({"document": DOCUMENT, "ttl": "0s"}, "ttl"),
        ({"document": DOCUMENT, "ttl": "soon"}, "ttl"),
        ({"document": DOCUMENT, "ttl": "9000d"}, "ttl"),
        ({"document": DOCUMENT, "ttl": True}, "ttl"),
        ({"document": DOCUMENT, "ttl_s": 60}, "ttl_s"),
        ({"document": DOCUMENT, "name": ""}, "name"),
        ({"document": 3}, "document"),
    ],
)
def test_what_cannot_be_made(alpha: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    answer = alpha.post("/v1/prefixes", json=body)
    if body.get("document") == "\\ud800":
        answer = alpha.post(
            "/v1/prefixes",
            content=b'{"document": "\\ud800"}',
            headers={"content-type": "application/json"},
        )
        param = "document"
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_every_ratio_of_a_spec_may_be_asked_for() -> None:
    assert PrefixBody(document=DOCUMENT, ratio=MOST_RATIO).ratio == CompressionSpec(ratio=MOST_RATIO).ratio
    with pytest.raises(ValidationError, match="less than or equal to 1000"):
        PrefixBody(document=DOCUMENT, ratio=MOST_RATIO + 1)
    with pytest.raises(InvalidSpec):
        CompressionSpec(ratio=MOST_RATIO + 1)


@pytest.mark.parametrize(
    ("letter", "said"),
    [
        ("\u001b]0;pwned\u0007", "U+001B"),
        ("\r\n", "U+000D"),
        ("\u009b31m", "U+009B"),
        ("\u202e", "U+202E"),
        ("\u2028", "U+2028"),
    ],
)
def test_a_name_that_terminals_would_obey_is_refused(alpha: httpx.Client, letter: str, said: str) -> None:
    answer = alpha.post("/v1/prefixes", json={"document": DOCUMENT, "name": f"evil{letter}"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "name")
    assert error["message"] == f"name: {said} is a control or format character: leave it out"


@pytest.mark.parametrize(("place", "word"), [(100, "Hydra"), (-100, "Lerna")])
def test_damage_is_told_and_counted_once(
    keeping: Keeping, alpha: httpx.Client, place: int, word: str
) -> None:
    """In the header, where the lookup finds it, or in a factor, where the load does."""

    def counted() -> float:
        with keeping[0].http("sk-operator") as http:
            told = http.get("/metrics").text
        (figure,) = re.findall(r"^xkv_verification_failures_total (\S+)$", told, re.M)
        return float(figure)

    document, before = f"{word} lives in the swamp. " * 6, counted()
    made = make(alpha, document=document)
    blob = next(Path(keeping[1].blobs.url).rglob(f"{made['id']}.safetensors"))
    content = bytearray(blob.read_bytes())
    content[place] ^= 1
    blob.write_bytes(content)
    reasons = []
    for question in ("Where?", "Since when?"):
        answer = chat(alpha, ("user", f"{document}\n\n{question}"))
        assert answer.status_code == 200
        reasons.append(answer.json()["xkv"]["miss"]["reason"])
    assert reasons == ["corrupt", "no_artifact"]
    assert counted() == before + 1
