"""The examples as a reader runs them: one command, the bundled model, real Ray, HTTP, Redis and Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from backend import backend_of, until
from browser import CHROMIUM, browse
from command_runs import PATIENT_RAY
from example_runs import ROOT, Running, example, is_taken, read_events, wait_for_urls
from openai import AsyncOpenAI
from served import use_factors

from examples.chat_backend.app import create_app
from examples.chat_backend.chat import Chat
from examples.documents import Documents
from examples.local_server import CORPUS, free_port
from examples.rag.__main__ import bundled_questions
from examples.rag.measure import known_questions, measure
from examples.rag.pipeline import Pipeline
from examples.rag.retriever import Retriever

DOCUMENTS = ("bulletin-houston-lucky-dove-society.txt", "report-mendoza-grey-hill-company.md")
QUESTIONS = ROOT / "examples" / "questions"
TYPE = "document.getElementById('text').value = %s; document.getElementById('send').click()"

pytestmark = pytest.mark.slow


def facts(document: str, count: int) -> list[tuple[str, str]]:
    """Questions and right answers."""
    known = [one for one in known_questions(QUESTIONS) if one.source == Path(document).stem]
    return [(one.question, one.answer) for one in known[:count]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`python -m examples.chat_backend` over a folder of its own, until it is told to end."""
    folder = tmp_path_factory.mktemp("examples")
    docs = folder / "docs"
    docs.mkdir()
    for name in DOCUMENTS:
        shutil.copy(CORPUS / name, docs)
    (docs / "broken.txt").write_bytes(b"\xff")  # is left out, and the rest served
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "examples.chat_backend", "--docs", docs, "--store", folder / "store"]
    command += ["--port", str(port)]
    # A Ray of its own needs a secret of its own, whatever the tests' shared cluster has.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | PATIENT_RAY
    with log.open("w") as output:
        backend = subprocess.Popen(command, cwd=ROOT, env=alone, stdout=output, stderr=output)
    try:
        base_url = wait_for_urls(log, backend)
        started = Running(f"http://127.0.0.1:{port}", base_url, docs)
        for name in DOCUMENTS:
            use_factors(base_url, (docs / name).read_text().strip())
        yield started
    finally:
        backend.terminate()
        backend.wait(300)
    assert backend.returncode == 0, log.read_text()
    with pytest.raises(httpx.ConnectError):  # the server that it started has ended with it
        httpx.get(f"{base_url}/models")


def test_several_users_talk_at_once_each_about_a_document(running: Running) -> None:
    assert httpx.get(f"{running.url}/documents", timeout=60).json() == list(DOCUMENTS)
    asked = [(document, facts(document, 3)) for document in DOCUMENTS * 2]

    def talk(document: str, questions: list[tuple[str, str]]) -> list[dict[str, Any]]:
        name, ends = running.begin(document), []
        for question, answer in questions:
            text, end = running.ask(name, question)
            assert text == end["text"] == answer
            ends.append(end)
        said = [text for fact in questions for text in fact]
        assert [one["content"] for one in running.messages(name)] == said
        return ends

    with ThreadPoolExecutor() as users:
        talks = list(users.map(lambda one: talk(*one), asked))
    for first, *later in talks:
        assert first["artifact"] and first["miss"] is None
        assert first["prefix_tokens"] > 0.9 * first["prompt_tokens"]
        for before, end in zip([first, *later[:-1]], later, strict=True):
            assert end["prefix_tokens"] == first["prefix_tokens"]
            # The server kept the turn before: only what follows it is computed.
            assert end["cached_tokens"] >= before["prompt_tokens"]
    assert len({ends[0]["artifact"] for ends in talks}) == len(DOCUMENTS)


def test_what_the_backend_refuses(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.post("/conversations", json={"document": "../secret"}).status_code == 404
        assert client.get("/conversations/none").status_code == 404
        assert client.post("/conversations/none/messages", json={"text": "Who?"}).status_code == 404
        name = running.begin(DOCUMENTS[0])
        for text in ("", "x" * 4001):
            assert client.post(f"/conversations/{name}/messages", json={"text": text}).status_code == 422
        with client.stream("POST", f"/conversations/{name}/messages", json={"text": "<|user|>"}) as answer:
            [(kind, message)] = read_events(answer)
        assert kind == "error" and "special token" in message
        assert running.messages(name) == []
        assert client.delete(f"/conversations/{name}").status_code == 204
        assert client.get(f"/conversations/{name}").status_code == 404


def test_an_answer_that_a_user_leaves_stays_as_far_as_it_came(running: Running) -> None:
    name = running.begin(DOCUMENTS[0])
    (question, answer), (next_question, next_answer) = facts(DOCUMENTS[0], 2)
    path = f"{running.url}/conversations/{name}/messages"
    with httpx.stream("POST", path, json={"text": question}, timeout=60) as stream:
        kind, piece = next(read_events(stream))
        assert kind == "text" and answer.startswith(piece)
    deadline = time.monotonic() + 120
    while not (said := running.messages(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [one["role"] for one in said] == ["user", "assistant"]
    assert said[1]["content"] and answer.startswith(said[1]["content"])
    assert running.ask(name, next_question)[0] == next_answer


def test_a_server_that_says_nothing_holds_up_one_conversation_alone() -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, answers none
    client = AsyncOpenAI(
        base_url=f"http://127.0.0.1:{silent.getsockname()[1]}/v1", api_key="-", max_retries=0
    )
    app = create_app(Chat(client, "model", Documents(CORPUS)))
    with silent, backend_of(app) as url, httpx.Client(base_url=url, timeout=60) as browser:
        names = [browser.post("/conversations", json={"document": DOCUMENTS[0]}).json()["id"] for _ in "12"]
        first, second = (f"/conversations/{name}/messages" for name in names)
        with browser.stream("POST", first, json={"text": "Who?"}) as waiting:
            assert waiting.status_code == 200
            assert until(lambda: browser.post(first, json={"text": "Why?"}, timeout=2).status_code == 409)
            with browser.stream("POST", second, json={"text": "Who?"}) as other:
                assert other.status_code == 200
        # Both have left: the conversations are free again, and as they were.
        for name, path in zip(names, (first, second), strict=True):
            assert browser.get(f"/conversations/{name}").json()["messages"] == []
            assert until(lambda path=path: is_taken(browser, path))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(running: Running, tmp_path: Path) -> None:
    """Types questions into the page, and reads what it shows, on a phone and on a desk."""
    (question, answer), (next_question, next_answer) = facts(DOCUMENTS[0], 2)
    with browse(running.url, tmp_path / "profile") as page:
        assert page.wait("document.querySelectorAll('option').length") == len(DOCUMENTS)
        assert page.wait("conversation && conversation.document") == DOCUMENTS[0]
        for number, (asked, expected) in enumerate(((question, answer), (next_question, next_answer)), 1):
            page.evaluate(TYPE % json.dumps(asked))
            page.wait(f"document.querySelectorAll('.from').length == {number}")
            shown = page.evaluate(
                "[...document.querySelectorAll('#talk p')].slice(-3).map(p => p.textContent)"
            )
            assert shown[:2] == [asked, expected]
            assert re.match(r"\d+ of \d+ prompt tokens from factors of artifact [0-9a-f]{12}, ", shown[2])
        for width in (390, 1200):
            page.resize(width)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            page.picture(tmp_path / f"{width}.png")
        assert page.problems == []


def test_a_conversation_in_the_terminal(running: Running) -> None:
    asked = facts(DOCUMENTS[1], 2)
    place = ["--base-url", running.base_url, "--docs", running.docs, "--document", DOCUMENTS[1]]
    done = example("-m", "examples.chat_backend", *place, *(f"--ask={question}" for question, _ in asked))
    assert done.returncode == 0, done.stderr
    for question, answer in asked:
        assert f"> {question}\n{answer}\n" in done.stdout
    kept = [int(count) for count in re.findall(r"factors, (\d+) kept", done.stdout)]
    assert len(kept) == 2 and kept[1] > 0


def test_rag_answers_with_its_source(running: Running) -> None:
    question, answer = facts(DOCUMENTS[0], 2)[1]
    place = ["--base-url", running.base_url, "--docs", running.docs]
    done = example("-m", "examples.rag", *place, question, "Zzyzx?")
    assert done.returncode == 0, done.stderr
    assert f"> {question}\n{answer}\n  source: {DOCUMENTS[0]}" in done.stdout
    stored, _, computed = re.findall(r"(\d+) of \d+ prompt tokens cached", done.stdout)
    assert int(stored) > 500 and int(computed) == 0
    assert "no document has a word of this question" in done.stdout


def test_rag_is_measured(running: Running) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=running.base_url, api_key="-") as client:
            model = (await client.models.list()).data[0].id
            documents = Documents(running.docs)
            known = bundled_questions(documents)[::4]
            got = await measure(Pipeline(client, model, documents), known)
        assert got.questions == len(known) == got.found
        assert got.right == got.right_of_found > 0.9 * got.questions
        assert got.cached > 0.9
        assert min(got.stored_s, got.first_use_s, got.computed_s) > 0

    asyncio.run(run())


@pytest.mark.parametrize("name", ["langchain_chat", "llama_index_chat"])
def test_frameworks_stream_and_tell_usage(running: Running, name: str) -> None:
    (question, answer), *_ = facts(DOCUMENTS[1], 1)
    place = ["--base-url", running.base_url, "--document", running.docs / DOCUMENTS[1]]
    done = example("-m", f"examples.{name}", *place, question)
    assert done.returncode == 0, done.stderr
    said, usage = done.stdout.splitlines()
    assert said == answer
    cached, prompt = map(int, re.findall(r"\d+", usage))
    assert 0.9 * prompt < cached < prompt
    refused = example("-m", f"examples.{name}", *place, "--model", "gpt-none", question)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("error: ") and "gpt-none" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    unread = example("-m", f"examples.{name}", "--document", "none.md", question)
    assert unread.returncode == 2 and "no such file or folder" in unread.stderr.splitlines()[-1]


@pytest.mark.parametrize(("page", "block"), [("README.md", -1), ("docs/serving.md", 0)])
def test_the_pages_lines_that_point_a_client_at_the_server(
    running: Running, page: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # README's read a document of the corpus
    lines = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[block]
    question, answer = facts(DOCUMENTS[1], 2)[1]  # which README's asks in other words
    text = Documents(running.docs).text(DOCUMENTS[1])
    names: dict[str, Any] = {} if page == "README.md" else {"document": text, "question": question}
    lines = lines.replace("http://127.0.0.1:8000/v1", running.base_url)
    exec(lines.replace("messages=", "temperature=0, messages="), names)  # what it says is compared
    reply = names["answer"]
    assert reply.choices[0].message.content == answer
    assert re.fullmatch("[0-9a-f]{64}", reply.xkv["artifact"] or "") and reply.xkv["miss"] is None
    assert 500 < reply.usage.prompt_tokens_details.cached_tokens < reply.usage.prompt_tokens


@pytest.mark.parametrize("name", ["chat_backend", "rag"])
def test_no_server_and_no_documents_are_one_line_each(name: str, tmp_path: Path) -> None:
    away = f"http://127.0.0.1:{free_port()}/v1"
    done = example("-m", f"examples.{name}", "--base-url", away)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no server answers at {away}") and "Traceback" not in done.stderr
    empty = example("-m", f"examples.{name}", "--docs", tmp_path)
    assert (empty.returncode, empty.stderr.splitlines()[0]) == (1, f"error: no documents in {tmp_path}")


def test_the_retriever_finds_all_but_the_rooms_of_two_documents() -> None:
    documents = Documents(CORPUS)
    retriever = Retriever({name: documents.text(name) for name in documents.names})
    wrong = []
    for one in known_questions(QUESTIONS):
        found = retriever.find(one.question)
        assert found is not None
        if Path(found.document).stem != one.source:
            wrong.append(one.question)
    assert len(wrong) == 7 and sum("room" in question for question in wrong) == 6
    assert retriever.find("?!") is None and retriever.find("Zzyzx") is None
