"""`Pipeline`: retrieve a document, then answer over it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from openai import AsyncOpenAI

from examples.answers import Answer, stream_answer
from examples.documents import Documents, Message
from examples.rag.retriever import Found, Retriever

MAX_TOKENS = 128


@dataclass(frozen=True)
class Reply:
    """An answer and its source."""

    found: Found
    answer: Answer


class Pipeline:
    """Retrieval, then one request.

    Retrieval usually fills a prompt with passages, whose order and choice are new each time: nothing of such
    a prompt is stored anywhere. Here it chooses a *document*, which is compressed already, so a long source
    costs the server no more than its question.

    Args:
        model: as the server names it.
    """

    def __init__(self, client: AsyncOpenAI, model: str, documents: Documents) -> None:
        self._client, self._model, self._documents = client, model, documents
        self._retriever = Retriever({name: documents.text(name) for name in documents.names})

    def find(self, question: str) -> Found | None:
        """The document for a question, and the sentence that speaks for it."""
        return self._retriever.find(question)

    async def reply(self, question: str, found: Found) -> Reply:
        """The answer over the stored prefix of a document. Raises as `stream_answer`."""
        [message] = self._documents.prompt(found.document, [{"role": "user", "content": question}])
        return Reply(found, await self._answer(message["content"]))

    async def reply_computed(self, question: str, found: Found) -> Reply:
        """The same without the stored prefix: a first line that nobody has sent before makes it another one.

        Raises as `stream_answer`.
        """
        [message] = self._documents.prompt(found.document, [{"role": "user", "content": question}])
        return Reply(found, await self._answer(f"Copy {secrets.token_hex(4)}\n\n{message['content']}"))

    async def _answer(self, content: str) -> Answer:
        prompt: list[Message] = [{"role": "user", "content": content}]
        async for piece in stream_answer(self._client, self._model, prompt, MAX_TOKENS):
            if isinstance(piece, Answer):
                return piece
        raise AssertionError("a stream that was asked for usage ends with it")
