"""The examples as a reader runs them: one command, the bundled model, real Ray, HTTP, Redis and Chromium."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, browse
from openai import AsyncOpenAI

from examples.documents import Documents
from examples.local_server import CORPUS, free_port
from examples.rag.measure import known_questions, measure
from examples.rag.pipeline import Pipeline
from examples.rag.retriever import Retriever

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("bulletin-houston-lucky-dove-society.txt", "report-mendoza-grey-hill-company.md")
QUESTIONS = ROOT / "examples" / "questions"
WAIT = """new Promise((done, fail) => {
  const end = Date.now() + 60000;
  const look = () => { const found = %s; if (found) done(found);
    else if (Date.now() > end) fail("not in time"); else setTimeout(look, 50); };
  look();
})"""
TYPE = "document.getElementById('text').value = %s; document.getElementById('send').click()"

pytestmark = pytest.mark.slow


def facts(document: str, count: int) -> list[tuple[str, str]]:
    """Questions and right answers."""
    known = [one for one in known_questions(QUESTIONS) if one.source == Path(document).stem]
    return [(one.question, one.answer) for one in known[:count]]


@dataclass(frozen=True)
class Running:
    """What the one command brought up: the backend, and the server behind it."""

    url: str
    base_url: str
    docs: Path

    def begin(self, document: str) -> str:
        """The id of a new conversation."""
        talk = httpx.post(f"{self.url}/conversations", json={"document": document}, timeout=60)
        assert talk.status_code == 201 and talk.json()["messages"] == []
        return str(talk.json()["id"])

    def ask(self, name: str, question: str) -> tuple[str, dict[str, Any]]:
        """The text as it was streamed, and the last event."""
        path = f"{self.url}/conversations/{name}/messages"
        with httpx.stream("POST", path, json={"text": question}, timeout=120) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = list(read_events(answer))
        *pieces, (kind, end) = events
        assert kind == "end", end
        assert len(pieces) > 1 and {piece for piece, _ in pieces} == {"text"}
        return "".join(data for _, data in pieces), end

    def messages(self, name: str) -> list[dict[str, str]]:
        """What was said."""
        found: list[dict[str, str]] = httpx.get(f"{self.url}/conversations/{name}").json()["messages"]
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
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`python -m examples.chat_backend` over a folder of its own, until it is told to end."""
    folder = tmp_path_factory.mktemp("examples")
    docs = folder / "docs"
    docs.mkdir()
    for name in DOCUMENTS:
        shutil.copy(CORPUS / name, docs)
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "examples.chat_backend", "--docs", docs, "--store", folder / "store"]
    with log.open("w") as output:
        backend = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=output, stderr=output)
    try:
        base_url = wait_for_urls(log, backend)
        yield Running(f"http://127.0.0.1:{port}", base_url, docs)
    finally:
        backend.terminate()
        backend.wait(120)
    assert backend.returncode == 0, log.read_text()
    with pytest.raises(httpx.ConnectError):  # the server that it started has ended with it
        httpx.get(f"{base_url}/models")


def wait_for_urls(log: Path, backend: subprocess.Popen[bytes]) -> str:
    """The base URL of the server, once the backend says that it is up."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and backend.poll() is None:
        if "chat at http" in log.read_text():
            found = re.search(r"(http://\S+/v1), prefixes", log.read_text())
            assert found
            return found[1]
        time.sleep(0.2)
    raise AssertionError(f"the example did not start:\n{log.read_text()}")


def test_several_users_talk_at_once_each_about_a_document(running: Running) -> None:
    assert httpx.get(f"{running.url}/documents").json() == list(DOCUMENTS)
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
    deadline = time.monotonic() + 30
    while not (said := running.messages(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [one["role"] for one in said] == ["user", "assistant"]
    assert said[1]["content"] and answer.startswith(said[1]["content"])
    assert running.ask(name, next_question)[0] == next_answer


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(running: Running, tmp_path: Path) -> None:
    """Types questions into the page, and reads what it shows, on a phone and on a desk."""
    (question, answer), (next_question, next_answer) = facts(DOCUMENTS[0], 2)
    with browse(running.url, tmp_path / "profile") as page:
        assert page.evaluate(WAIT % "document.querySelectorAll('option').length") == len(DOCUMENTS)
        assert page.evaluate(WAIT % "conversation && conversation.document") == DOCUMENTS[0]
        for number, (asked, expected) in enumerate(((question, answer), (next_question, next_answer)), 1):
            page.evaluate(TYPE % json.dumps(asked))
            page.evaluate(WAIT % f"document.querySelectorAll('.from').length == {number}")
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
            known = [one for one in known_questions(QUESTIONS) if f"{one.source}." in " ".join(DOCUMENTS)]
            got = await measure(Pipeline(client, model, Documents(running.docs)), known[::4])
        assert got.questions == len(known[::4]) == got.found
        assert got.right == got.right_of_found > 0.9 * got.questions
        assert got.cached > 0.9
        assert min(got.stored_s, got.first_use_s, got.computed_s) > 0

    asyncio.run(run())


@pytest.mark.parametrize("name", ["langchain_chat.py", "llama_index_chat.py"])
def test_frameworks_stream_and_tell_usage(running: Running, name: str) -> None:
    (question, answer), *_ = facts(DOCUMENTS[1], 1)
    place = ["--base-url", running.base_url, "--document", running.docs / DOCUMENTS[1]]
    done = example(f"examples/{name}", *place, question)
    assert done.returncode == 0, done.stderr
    said, usage = done.stdout.splitlines()
    assert said == answer
    cached, prompt = map(int, re.findall(r"\d+", usage))
    assert 0.9 * prompt < cached < prompt


def test_the_readmes_lines_that_point_a_client_at_the_server(running: Running) -> None:
    page = (ROOT / "README.md").read_text()
    lines = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    names: dict[str, Any] = {"text": Documents(running.docs).text(DOCUMENTS[0])}
    exec(lines.replace("http://127.0.0.1:8000/v1", running.base_url), names)
    usage = names["answer"].usage
    assert 500 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


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
