"""`xkv serve`: OpenAI's client against a real server on Ray Serve, with the bundled model."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asking import Asker, example_document, first_turn, wait_until
from command_runs import Xkv
from openai import APIStatusError
from scaling import Crowd, Logs, questions
from served import Server, use_factors
from stopping import (
    LongAnswers,
    check_that_ctrl_c_twice_breaks_off_answers,
    check_that_it_ends_with_its_ray,
    wait_until_running,
)

from xkv_artifacts.embedded import embedded_redis_url

pytestmark = pytest.mark.slow

NAMES = (
    "bulletin-houston-lucky-dove-society",
    "register-chicago-broken-wren-council",
    "report-mendoza-grey-hill-company",
)


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("served") / "store")


@pytest.fixture(scope="module")
def server(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--store", store_url, "--stored-tails", "256MiB", "--stop-grace", "10m")
    started = Server(tmp_path_factory.mktemp("server"), *options)
    yield started
    assert started.stop() == 0, started.log.read_text()


@pytest.fixture(scope="module")
def asker(server: Server) -> Asker:
    return Asker(server.url)


@pytest.fixture(scope="module")
def prefix(server: Server, asker: Asker) -> dict[str, Any]:
    """The first document, made a prefix of by the server itself."""
    document, _ = example_document(NAMES[0])
    made = httpx.post(f"{server.url}/v1/prefixes", json={"document": document, "ratio": 20}, timeout=60)
    assert made.status_code == 202, made.text
    url = f"{server.url}/v1/prefixes/{made.json()['id']}"
    end = time.monotonic() + 300
    while (found := httpx.get(url, timeout=60).json())["status"] != "ready":
        assert found["status"] in ("queued", "running") and time.monotonic() < end, found
        time.sleep(0.2)
    use_factors(f"{server.url}/v1", document)
    return dict(found)


def test_a_conversation_over_a_prefix_is_answered_right_and_goes_on(
    asker: Asker, prefix: dict[str, Any]
) -> None:
    document, questions = example_document(NAMES[0])
    messages: list[dict[str, str]] = []
    held = 0
    for item in questions[:3]:
        asked = item["question"]
        messages += first_turn(document, asked) if not messages else [{"role": "user", "content": asked}]
        reply = asker.ask(messages)
        assert reply.choices[0].message.content == item["answer"]
        assert reply.xkv["artifact"] == prefix["id"] and reply.xkv["miss"] is None
        cached = reply.usage.prompt_tokens_details.cached_tokens
        assert cached >= prefix["tokens"] and cached > held
        held = cached
        messages.append({"role": "assistant", "content": item["answer"]})


def test_a_stream_is_the_answer_in_pieces(asker: Asker, prefix: dict[str, Any]) -> None:
    document, questions = example_document(NAMES[0])
    stream = asker.ask(
        first_turn(document, questions[3]["question"]), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == questions[3]["answer"]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= prefix["tokens"]


def test_what_waits_for_a_replica_is_seen(server: Server) -> None:
    """A replica takes 32 requests, of which 16 run; the other 8 wait in Serve's router, until answers end."""
    body = LongAnswers(server).body(0)
    url = f"{server.url}/v1/completions"

    async def see() -> None:
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=50)) as client:
            asked = [asyncio.create_task(client.post(url, json=body)) for _ in range(40)]
            seen: dict[str, int] = {}
            end = time.monotonic() + 120
            while seen.get("running") != 16 or seen.get("waiting", 0) <= 16:
                assert time.monotonic() < end, seen
                await asyncio.sleep(0.2)
                seen = (await client.get(f"{server.url}/status")).json()["engine"]
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(see())
    wait_until(lambda: httpx.get(f"{server.url}/status", timeout=60).json()["traffic"]["in_flight"] == 0)


def test_a_busy_replica_has_a_second_to_say_how_busy_it_is(server: Server) -> None:
    """Asked by the router, which is in the ingress."""
    (ingress,) = server.processes("xkv:ingress")
    assert ingress.environ()["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] == "1"


def test_a_document_that_is_not_stored_is_computed_and_said_to_be(asker: Asker, server: Server) -> None:
    document, questions = example_document(NAMES[1])
    reply = asker.ask(first_turn(document, questions[0]["question"]))
    assert reply.choices[0].message.content == questions[0]["answer"]
    assert reply.xkv["artifact"] is None and reply.xkv["miss"]["reason"] in ("no_artifact", "diverges")


def test_many_ask_at_once_and_some_leave(asker: Asker, prefix: dict[str, Any], server: Server) -> None:
    document, questions = example_document(NAMES[0])

    def ask(item: dict[str, str]) -> bool:
        return bool(
            asker.ask(first_turn(document, item["question"])).choices[0].message.content == item["answer"]
        )

    client = LongAnswers(server)  # a question's answer is whole before its client is heard to have left

    def leave(number: int) -> None:
        stream = client.openai.completions.create(**client.body(number, prompt=document), stream=True)
        next(iter(stream))
        stream.close()

    wait_until_running(server, 0)
    before = _cancelled(server)
    with ThreadPoolExecutor(12) as pool:
        gone = [pool.submit(leave, number) for number in range(4)]
        right = list(pool.map(ask, questions[:8]))
    assert all(right) and all(one.result() is None for one in gone)
    wait_until(lambda: _cancelled(server) == before + 4, seconds=60)


def test_bad_requests_are_refused_in_openais_shape(server: Server) -> None:
    for body, status in (
        ({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404),
        ({"model": "model", "messages": []}, 400),
        ({"model": "model", "messages": [{"role": "user", "content": "x"}], "n": 3}, 400),
        ({"model": "model", "messages": [{"role": "user", "content": "word " * 40_000}]}, 400),
    ):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def test_its_engine_has_the_malloc_that_comes_with_ray(server: Server) -> None:
    engine = server.engine_process()
    assert any("libjemalloc" in mapped.path for mapped in engine.memory_maps())
    assert "dirty_decay_ms:1000" in engine.environ()["MALLOC_CONF"]


def test_its_logs_are_json_that_names_the_request_and_holds_no_text(
    asker: Asker, prefix: dict[str, Any], server: Server
) -> None:
    """In the ingress and in the engine replica; the controller and the proxy write JSON as well."""
    document, questions = example_document(NAMES[0])
    asked = first_turn(document, questions[5]["question"])
    answer = asker.client.chat.completions.with_raw_response.create(
        model=asker.model, messages=asked, max_tokens=8, extra_headers={"x-request-id": "mine-7"}
    )
    assert answer.headers.get_list("x-request-id") == ["mine-7"]
    (found,) = re.findall(r"logs in (\S+)", server.log.read_text())
    files = list(Path(found).glob("*.log"))
    assert {path.name.split("_")[0] for path in files} >= {"controller", "proxy", "replica"}

    def lines() -> dict[str, list[dict[str, Any]]]:
        """Lines about the request, by deployment."""
        told: dict[str, list[dict[str, Any]]] = {}
        for path in files:
            for line in map(json.loads, path.read_text().splitlines()):
                assert {"levelname", "message", "asctime"} <= line.keys()
                if line.get("request_id") == "mine-7":
                    told.setdefault(line["deployment"], []).append(line)
        return told

    wait_until(lambda: {"xkv_ingress", "xkv_engine"} <= lines().keys())
    (line,) = (line for line in lines()["xkv_ingress"] if "request" in line)
    assert line["request"]["status"] == 200 and line["request"]["artifact"] == prefix["id"]
    written = b"".join(path.read_bytes() for path in Path(found).parent.rglob("*") if path.is_file())
    for text in (document[:40], document[-40:], questions[5]["question"], questions[5]["answer"]):
        assert text.encode() not in written


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-request-id", b"x y"),
        ("x-request-id", b'{"a":1}'),
        ("x-request-id", b"a" * 500),
        ("x-request-id", b"\xff\x80"),
        ("x-session-id", b"\xff"),
        ("serve_multiplexed_model_id", b"\xff"),
        ("serve-multiplexed-model-id", b"\xff"),
    ],
)
def test_headers_that_serve_s_proxy_would_stumble_over(server: Server, header: str, value: bytes) -> None:
    """One id in the answer, the log's and the app's own; what would steer Serve is left out."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        answer = http.get("/v1/models", headers=[(header.encode(), value)])
    assert answer.status_code == 200, answer.text
    (told,) = answer.headers.get_list("x-request-id")
    assert told.startswith("req-") if header == "x-request-id" else re.fullmatch(r"[0-9a-f-]{36}", told)
    (found,) = re.findall(r"logs in (\S+)", server.log.read_text())
    files = list(Path(found).glob("*ingress*.log"))
    wait_until(lambda: any(f'"request_id": "{told}"' in path.read_text() for path in files))


def test_a_prefix_that_is_deleted_answers_nobody_any_more(asker: Asker, server: Server) -> None:
    """Not even from memory, where it was used and a conversation stands behind it."""
    document, _ = example_document("minutes-pretoria-sturdy-panda-union")
    made, url = _stored(server, document)
    use_factors(f"{server.url}/v1", document)
    assert asker.ask(first_turn(document, "Who?"), max_tokens=8).xkv["artifact"] == made
    assert httpx.delete(url, timeout=60).status_code == 200
    for options in ({}, {"extra_body": {"prefix_id": made}}):
        reply = asker.ask(first_turn(document, "Who?"), max_tokens=8, **options)
        assert reply.xkv["artifact"] is None and reply.xkv["prefix_tokens"] == 0
        assert reply.xkv["miss"]["reason"] in ("no_artifact", "diverges", "evicted")


def test_a_corrupt_prefix_is_computed_instead_and_made_again(
    asker: Asker, server: Server, store_url: str, xkv: Xkv
) -> None:
    """Its bytes are damaged before the server ever reads them. The others are for a machine that is so slow
    that reading one took longer than computing it."""
    for name in (
        "rules-nagoya-open-swan-foundation",
        "rules-salzburg-vivid-ferry-association",
        "index-tokyo-orange-crow-council",
    ):
        document, questions = example_document(name)
        made, url = _stored(server, document)
        (blob,) = Path(store_url).rglob(f"*{made}*.safetensors")
        data = bytearray(blob.read_bytes())
        data[-2000] ^= 0xFF
        blob.write_bytes(data)
        first = asker.ask(first_turn(document, questions[0]["question"]))
        assert first.choices[0].message.content == questions[0]["answer"]
        assert first.xkv["artifact"] is None
        if first.xkv["miss"]["reason"] == "corrupt":
            break
    assert first.xkv["miss"]["reason"] == "corrupt"
    wait_until(lambda: httpx.get(url, timeout=60).json().get("status") == "ready")
    assert len(list(Path(store_url).rglob(f"*{made}*.safetensors"))) == 2  # one is in quarantine


@dataclass(frozen=True)
class Remade:
    """A prefix that lost its file and has been made again, and the answer that was told so."""

    id: str
    document: str
    questions: list[dict[str, str]]
    reply: Any


@pytest.fixture(scope="module")
def remade(asker: Asker, prefix: dict[str, Any], server: Server, store_url: str) -> Remade:
    """Its file goes while others are answered. The HTTP process has read its header, and no engine has loaded
    it: what is in memory needs no file. The other documents are for a machine that is so slow that finding
    out took longer than computing it."""
    other, others = example_document(NAMES[0])
    for known in (
        "notices-oakland-red-rocket-association",
        "notices-valencia-vivid-acorn-institute",
        "register-boston-ghostly-rose-foundation",
    ):
        document, questions = example_document(known)
        name, url = _stored(server, document)
        with pytest.raises(APIStatusError, match="share"):
            asker.ask(first_turn("Another document.", "Who?"), extra_body={"prefix_id": name})
        with ThreadPoolExecutor(4) as pool:
            load = [pool.submit(_answers, asker, other, item) for item in others[:4]]
            (blob,) = Path(store_url).glob(f"prefixes/*/{name}.safetensors")
            blob.unlink()
            reply = asker.ask(first_turn(document, questions[0]["question"]), max_tokens=96)
            assert all(one.result() for one in load)
        if (reply.xkv["miss"] or {}).get("reason") == "missing":
            break
    assert reply.xkv["miss"]["reason"] == "missing"
    wait_until(lambda: httpx.get(url, timeout=60).json().get("status") == "ready")
    assert blob.exists()
    return Remade(name, document, questions, reply)


def test_a_prefix_whose_file_is_gone_is_computed_instead(remade: Remade, server: Server) -> None:
    assert remade.reply.choices[0].message.content == remade.questions[0]["answer"]
    assert remade.reply.xkv["artifact"] is None and remade.reply.xkv["miss"]["reason"] == "missing"
    assert re.search(r'xkv_prefix_misses_total{reason="missing"} [12]\.0', server.metrics())  # of another too
    wait_until(
        lambda: re.search(r"xkv_missing_blobs_total [1-4]\.0", server.metrics())
    )  # engines' once a second


def test_a_replica_that_is_killed_is_replaced(
    asker: Asker, prefix: dict[str, Any], remade: Remade, server: Server
) -> None:
    """The stream that it answered ends with an error event, and whatever else it answered begins again. Its
    conversations are gone: the next one about a prefix begins with its factors again, though its file had
    been lost."""
    document, items = example_document(NAMES[0])
    client, logs, begun = LongAnswers(server), Logs(server), threading.Event()
    with ThreadPoolExecutor(1) as pool, Crowd(4, questions(asker, document, items[:6])) as crowd:
        stream = pool.submit(client.stream, 0, begun.set)
        assert begun.wait(120)
        server.engine_process().kill()
        error = stream.result(60)
        assert error is not None and error.code == "overloaded", repr(error)
        wait_until(logs.began_again)
    assert set(crowd.ends) == {"right"}
    use_factors(f"{server.url}/v1", remade.document)
    reply = asker.ask(first_turn(remade.document, remade.questions[1]["question"]), max_tokens=96)
    assert reply.choices[0].message.content == remade.questions[1]["answer"]
    assert reply.xkv["artifact"] == remade.id and reply.xkv["miss"] is None


def test_an_ingress_that_is_killed_is_replaced_and_nobody_works_for_its_clients(
    asker: Asker, prefix: dict[str, Any], server: Server
) -> None:
    """Its streams end with an error event, and others with a 503, which the proxy tells. The state board dies
    before, and comes back empty, of which nobody hears."""
    document, questions = example_document(NAMES[0])
    (board,) = server.processes("ray::StateBoard")
    board.kill()
    wait_until(lambda: [one for one in server.processes("ray::StateBoard") if one.pid != board.pid])
    time.sleep(11)  # longer than what the old one had said is believed
    wait_until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200)
    wait_until_running(server, 0)
    client, before = LongAnswers(server), _cancelled(server)
    begun = (threading.Event(), threading.Event())
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(client.whole, number) for number in (2, 3)]
        streams = [pool.submit(client.stream, number, begun[number].set) for number in (0, 1)]
        wait_until_running(server, 4)
        assert all(one.wait(120) for one in begun)  # a stream without headers yet would be such a 503
        (victim,) = server.processes("xkv:ingress")
        victim.kill()
        for answer in (one.result(60) for one in whole):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["message"] == "the answer broke off: its process died, or failed"
        for error in (one.result(60) for one in streams):
            assert error is not None and error.code == "overloaded", repr(error)
    wait_until(lambda: _answers(asker, document, questions[0]))
    wait_until_running(server, 0, seconds=60)
    assert _cancelled(server) == before + 4, "they came to their ends, for nobody"
    assert _answers(asker, document, questions[1])


def test_an_embedded_redis_that_is_killed_is_back_within_seconds(
    asker: Asker, prefix: dict[str, Any], server: Server, store_url: str
) -> None:
    document, questions = example_document(NAMES[0])
    wait_until(lambda: _artifact(asker, document, questions[0]) == prefix["id"])
    victim = next(
        process
        for process in psutil.process_iter(["cmdline"])
        if "redis-server" in (process.info["cmdline"] or [""])[0]
        and embedded_redis_url(store_url).removeprefix("unix://") in " ".join(process.info["cmdline"])
    )
    victim.kill()
    # The server starts it at once; a prompt that met it dead keeps others from asking for 5 s.
    assert _answers(asker, document, questions[1])
    wait_until(lambda: _artifact(asker, document, questions[2]) == prefix["id"], seconds=120)
    # It answers before the server has seen to all of it.
    wait_until(lambda: "the embedded Redis had died, and runs again" in server.log.read_text(), seconds=60)


def _cancelled(server: Server) -> float:
    """Answers that the engines gave up."""
    found = re.search(r"^xkv_engine_ended_cancelled_total (\S+)", server.metrics(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def _artifact(asker: Asker, document: str, item: dict[str, str]) -> str | None:
    """What served an answer, which is right in any case."""
    reply = asker.ask(first_turn(document, item["question"]), timeout=300)
    assert reply.choices[0].message.content == item["answer"]
    found: str | None = reply.xkv["artifact"]
    return found


@pytest.mark.long
def test_a_conversation_goes_on_after_a_restart(
    server: Server, store_url: str, xkv: Xkv, tmp_path: Path
) -> None:
    """From the store. The server of the other tests ends here, while it answers others; the next one, when
    its Ray's node is gone (the head in test_autoscaling.py). A slow machine may
    not have stored all conversations in time, nor find each one in time: one of a few has to come back."""
    document, questions = example_document(NAMES[2])
    talks = [
        _talk(server, first_turn(f"Copy {number}.\n{document}", questions[0]["question"]))
        for number in range(3)
    ]
    check_that_ctrl_c_twice_breaks_off_answers(server)
    again = Server(tmp_path, "--store", store_url, "--stored-tails", "256MiB")
    try:
        for messages, held in reversed(talks):  # the last one was stored first
            messages.append({"role": "user", "content": questions[1]["question"]})
            reply = Asker(again.url).ask(messages, max_tokens=8)
            if reply.usage.prompt_tokens_details.cached_tokens >= held:
                break
        assert reply.usage.prompt_tokens_details.cached_tokens >= held
        # Replicas say once a second what they did.
        wait_until(lambda: re.search(r"xkv_engine_tails_loaded_total [123]\.0", again.metrics()))
        assert "xkv_stored_tail_bytes" in again.metrics()
        check_that_it_ends_with_its_ray(again, "raylet/raylet")
    finally:
        again.stop()
    told = xkv("ls", "--store", store_url, "--json").json["stored_tails"]
    assert told["tails"] > 0 and told["bytes"] > 0
    assert f"stored tails of conversations: {told['tails']} (" in xkv("gc", "--store", store_url).out


def _talk(server: Server, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], int]:
    """A conversation after its first turn, which was computed, and how many tokens of it are held."""
    reply = Asker(server.url).ask(messages, max_tokens=8)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    answer = {"role": "assistant", "content": reply.choices[0].message.content or ""}
    return [*messages, answer], reply.usage.prompt_tokens


def _stored(server: Server, document: str) -> tuple[str, str]:
    """Have the server compress a document: the prefix's id, once it is ready, and its address."""
    made = httpx.post(f"{server.url}/v1/prefixes", json={"document": document, "ratio": 20}, timeout=60)
    url = f"{server.url}/v1/prefixes/{made.json()['id']}"
    wait_until(lambda: httpx.get(url, timeout=60).json().get("status") == "ready")
    return made.json()["id"], url


def _answers(asker: Asker, document: str, item: dict[str, str]) -> bool:
    try:
        reply = asker.ask(first_turn(document, item["question"]), timeout=300)
    except APIStatusError:
        return False
    return bool(reply.choices[0].message.content == item["answer"])
