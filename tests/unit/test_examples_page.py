"""The chat's page in Chromium, over a backend whose answers come when the test wants them to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import cast

import httpx
import pytest
from backend import backend_of, until
from browser import CHROMIUM, Page, browse

from examples.answers import Answer
from examples.chat_backend.app import create_app
from examples.chat_backend.chat import Chat
from examples.chat_backend.conversations import Conversation
from examples.documents import Documents
from examples.local_server import CORPUS

TYPE = "document.getElementById('text').value = %s; document.getElementById('send').click()"
TALK = "[...document.querySelectorAll('#talk p')].map(p => p.textContent)"
FREE = "!document.getElementById('send').disabled"
# The next request's answer is not given before held() is called.
HOLD_FIRST = """(() => { const real = window.fetch; window.fetch = async (...asked) => {
  window.fetch = real; const answer = await real(...asked);
  await new Promise(done => { window.held = done; }); return answer; }; })()"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Slow:
    """Answers "begun", and what else is to be said of a question once that is let."""

    def __init__(self) -> None:
        self.documents = Documents(CORPUS)
        self.let: set[str] = set()
        self.done: list[str] = []

    async def ask(self, _: Conversation, question: str) -> AsyncGenerator[str | Answer, None]:
        try:
            yield "begun"
            while question not in self.let:
                await asyncio.sleep(0.01)
            yield " and ended"
            yield Answer("", None, 0, 0, 10, None, 0.5)
            if question == "bad":
                raise httpx.ReadError("cut off")
        finally:
            self.done.append(question)


@pytest.fixture(scope="module")
def chat() -> Slow:
    return Slow()


@pytest.fixture(scope="module")
def page(chat: Slow, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    app = create_app(cast("Chat", chat))
    with backend_of(app) as url, browse(url, tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


def begin(page: Page) -> None:
    """A new chat, once it can be used; of two clicks the second one counts."""
    old = page.evaluate("conversation && conversation.id")
    page.evaluate("for (const _ of '12') document.getElementById('new').click()")
    page.wait(f"conversation && conversation.id !== {json.dumps(old)} && {FREE}")


def ask(page: Page, text: str) -> None:
    """Type a question, and wait until its answer has begun."""
    page.evaluate(TYPE % json.dumps(text))
    page.wait(f"{TALK}.slice(-1)[0] === 'begun'")


def test_a_new_chat_has_nothing_of_an_answer_under_way(page: Page, chat: Slow) -> None:
    begin(page)
    ask(page, "left")
    begin(page)
    assert until(lambda: chat.done == ["left"])  # the request was ended, too
    assert page.evaluate(TALK) == []
    assert page.evaluate("document.getElementById('stop').hidden")
    ask(page, "stayed")
    chat.let.add("stayed")
    page.wait("document.querySelector('.from')")
    assert page.evaluate(TALK)[:2] == ["stayed", "begun and ended"]
    assert page.problems == []


@pytest.fixture
def never_aborts(page: Page) -> Iterator[None]:
    """As if every abort came after the last of what it was to end had arrived."""
    page.evaluate("window.abort = AbortController.prototype.abort")
    page.evaluate("AbortController.prototype.abort = () => {}")
    yield
    page.evaluate("AbortController.prototype.abort = abort")


@pytest.mark.usefixtures("never_aborts")
@pytest.mark.parametrize("late", ["good", "bad"])
def test_what_comes_too_late_is_not_shown(page: Page, chat: Slow, late: str) -> None:
    begin(page)
    ask(page, late)
    begin(page)
    ask(page, f"after {late}")
    chat.let.add(late)
    assert until(lambda: late in chat.done)
    page.evaluate("new Promise(done => setTimeout(done, 300))")
    assert page.evaluate(TALK) == [f"after {late}", "begun"]
    assert not page.evaluate(FREE)
    chat.let.add(f"after {late}")
    page.wait("document.querySelector('.from')")
    assert page.evaluate(TALK)[:2] == [f"after {late}", "begun and ended"]
    assert page.problems == []


@pytest.mark.usefixtures("never_aborts")
def test_a_chat_that_begins_too_late_takes_no_place(page: Page) -> None:
    begin(page)
    page.evaluate(HOLD_FIRST)
    page.evaluate("for (const _ of '12') document.getElementById('new').click()")
    page.wait(f"window.held && {FREE}")
    second = page.evaluate("conversation.id")
    page.evaluate("document.getElementById('send').disabled = true")
    page.evaluate("held()")
    page.evaluate("new Promise(done => setTimeout(done, 300))")
    assert page.evaluate("conversation.id") == second
    assert not page.evaluate(FREE)
    page.evaluate("document.getElementById('send').disabled = false")


def test_an_answer_that_is_stopped_says_so(page: Page) -> None:
    begin(page)
    ask(page, "stopped")
    page.evaluate("document.getElementById('stop').click()")
    page.wait(FREE)
    assert page.evaluate(TALK) == ["stopped", "begun", "stopped"]


def test_a_chat_that_cannot_begin_says_why(page: Page) -> None:
    begin(page)
    page.evaluate("document.getElementById('document').add(new Option('gone'), 0)")
    page.evaluate("document.getElementById('document').value = 'gone'")
    page.evaluate("document.getElementById('new').click()")
    page.wait(f"{TALK}.length")
    assert page.evaluate(TALK) == ["no such document; GET /documents lists them"]
    assert not page.evaluate(FREE)  # there is nothing to ask about
    page.evaluate("document.getElementById('document').selectedIndex = 1")
    begin(page)
    assert page.evaluate(TALK) == []
