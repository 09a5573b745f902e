"""The web backend: conversations by id, answers streamed to the browser as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, Field

from examples.chat_backend.chat import Chat
from examples.chat_backend.conversations import Conversation, Conversations
from examples.connection import BROKEN_OFF, told

_PAGE = Path(__file__).with_name("page.html").read_text("utf-8")
_BUSY = "the last question is still being answered"
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'"
)


class Beginning(BaseModel):
    """Which document to talk about."""

    document: str


class Question(BaseModel):
    """What to ask next."""

    text: Annotated[str, Field(min_length=1, max_length=4000)]


class Talk(BaseModel):
    """A conversation as the page sees it."""

    id: str
    document: str
    messages: list[dict[str, str]]

    @classmethod
    def of(cls, conversation: Conversation) -> Talk:
        """What of it is told."""
        messages = [{"role": one["role"], "content": one["content"]} for one in conversation.messages]
        return cls(id=conversation.id, document=conversation.document, messages=messages)


def create_app(chat: Chat) -> FastAPI:
    """The app over one chat."""
    app = FastAPI(title="Chat over compressed documents")
    conversations = Conversations()

    def found(name: str) -> Conversation:
        try:
            return conversations.get(name)
        except KeyError:
            raise HTTPException(404, "no such conversation; begin a new one") from None

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY})

    @app.get("/documents")
    async def documents() -> list[str]:
        return chat.documents.names

    @app.post("/conversations", status_code=201)
    async def begin(beginning: Beginning) -> Talk:
        if beginning.document not in chat.documents.names:
            raise HTTPException(404, "no such document; GET /documents lists them")
        return Talk.of(conversations.begin(beginning.document))

    @app.get("/conversations/{name}")
    async def read(name: str) -> Talk:
        return Talk.of(found(name))

    @app.delete("/conversations/{name}", status_code=204)
    async def end(name: str) -> Response:
        conversations.end(found(name).id)
        return Response(status_code=204)

    @app.post("/conversations/{name}/messages")
    async def ask(name: str, question: Question) -> StreamingResponse:
        conversation = found(name)
        if conversation.turn.locked():
            raise HTTPException(409, _BUSY)
        events = _events(chat, conversation, question.text)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    return app


async def _events(chat: Chat, conversation: Conversation, question: str) -> AsyncIterator[str]:
    """One event for each piece, and one at the end: what is known of the answer, or why there is none."""
    if conversation.turn.locked():  # by a question that came in the same moment
        yield _event("error", _BUSY)
        return
    try:
        # A browser that goes away cancels this generator, and so the request to the server.
        async with aclosing(chat.ask(conversation, question)) as pieces:
            async for piece in pieces:
                if isinstance(piece, str):
                    yield _event("text", piece)
                else:
                    yield _event("end", asdict(piece))
    except openai.APIConnectionError:
        yield _event("error", "the model's server cannot be reached")
    except openai.APIError as error:
        yield _event("error", told(error))
    except httpx.TransportError:
        yield _event("error", BROKEN_OFF)


def _event(kind: str, data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
