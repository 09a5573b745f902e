"""`Chat`: asks the server about a conversation's document, and keeps what was said."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from openai import AsyncOpenAI

from examples.answers import Answer, stream_answer
from examples.chat_backend.conversations import Conversation
from examples.documents import Documents, Message

MAX_TOKENS = 256


class Chat:
    """Any number of conversations at once, over one client.

    Args:
        model: as the server names it.
    """

    def __init__(self, client: AsyncOpenAI, model: str, documents: Documents) -> None:
        self._client, self._model, self.documents = client, model, documents

    async def ask(self, conversation: Conversation, question: str) -> AsyncGenerator[str | Answer, None]:
        """The pieces of the answer, then what is known of it.

        An answer that is broken off stays in the conversation as far as it came; a question that got none
        leaves no trace.

        Raises:
            openai.APIError: the server refuses, or cannot be reached.
            httpx.TransportError: it breaks the answer off.
        """
        async with conversation.turn:
            said = ""
            begun: list[Message] = [*conversation.messages, {"role": "user", "content": question}]
            prompt = self.documents.prompt(conversation.document, begun)
            # The prompt begins with what the server saw and said before: it goes on from what it kept of it.
            answer = stream_answer(self._client, self._model, prompt, MAX_TOKENS)
            try:
                async with aclosing(answer) as pieces:
                    async for piece in pieces:
                        said += piece if isinstance(piece, str) else ""
                        yield piece
            finally:
                if said:
                    conversation.messages = [*begun, {"role": "assistant", "content": said}]
