"""What the examples say where a server dies in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from openai import AsyncOpenAI, OpenAI
from starlette.testclient import TestClient

from examples.chat_backend.app import _events, create_app
from examples.chat_backend.chat import Chat
from examples.chat_backend.conversations import Conversation
from examples.connection import plain_errors
from examples.documents import Documents
from examples.local_server import CORPUS

CHUNK = {"choices": [{"index": 0, "delta": {"content": "Half"}}]}


class Dying(BaseHTTPRequestHandler):
    """Streams the first words of an answer, and is gone."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        event = f"data: {json.dumps(CHUNK)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))  # and no last chunk
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing: stderr is what the examples say."""


@pytest.fixture
def base_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dying) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join(120)


def test_the_terminal_has_a_line_for_it(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    client = OpenAI(base_url=base_url, api_key="-")
    with pytest.raises(SystemExit) as ended, plain_errors():
        stream = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "Who?"}], stream=True
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content, end="")
    assert str(ended.value.code).startswith("error: the server broke the answer off\nhint: ")
    assert capsys.readouterr().out == "Half\n"  # the error has a line of its own


def test_the_page_has_an_event_for_it_and_keeps_what_came(base_url: str) -> None:
    app = create_app(Chat(AsyncOpenAI(base_url=base_url, api_key="-"), "model", Documents(CORPUS)))
    with TestClient(app) as browser:
        document = browser.get("/documents").json()[0]
        path = f"/conversations/{browser.post('/conversations', json={'document': document}).json()['id']}"
        events = browser.post(f"{path}/messages", json={"text": "Who?"}).text
        assert events == (
            'event: text\ndata: "Half"\n\nevent: error\ndata: "the server broke the answer off"\n\n'
        )
        said = [one["content"] for one in browser.get(path).json()["messages"]]
    assert said == ["Who?", "Half"]


def test_of_two_questions_in_the_same_moment_one_is_refused() -> None:
    """The second is let in before the first has begun."""
    chat = Chat(AsyncOpenAI(base_url="http://127.0.0.1:1/v1", api_key="-"), "model", Documents(CORPUS))
    talk = Conversation("1", chat.documents.names[0])

    async def ask() -> list[str]:
        async with talk.turn:
            return [event async for event in _events(chat, talk, "Who?")]

    assert asyncio.run(asyncio.wait_for(ask(), 60)) == [
        'event: error\ndata: "the last question is still being answered"\n\n'
    ]
    assert talk.messages == []
