"""`Answer`: what the server said, and where the prompt's tokens came from."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from examples.documents import Message


@dataclass(frozen=True)
class Answer:
    """The end of one answer.

    Args:
        text: all of it.
        artifact: id of the stored prefix that served the prompt, or None.
        prefix_tokens: of the prompt that came from its factors. cached_tokens: these, and those that the
            server kept from an earlier turn. prompt_tokens: all.
        miss: why no prefix served it, or not as far as one goes; None where a whole one did.
        first_s: from the request to the first text.
    """

    text: str
    artifact: str | None
    prefix_tokens: int
    cached_tokens: int
    prompt_tokens: int
    miss: str | None
    first_s: float


async def stream_answer(
    client: AsyncOpenAI, model: str, messages: Sequence[Message], max_tokens: int
) -> AsyncGenerator[str | Answer, None]:
    """The pieces of an answer as they come, then what is known of it.

    Args:
        max_tokens: of the answer.

    Raises:
        openai.APIError: the server refuses, or cannot be reached.
        httpx.TransportError: it breaks the answer off.
    """
    started, first_s, pieces = time.perf_counter(), 0.0, []
    stream = await client.chat.completions.create(
        model=model,
        messages=cast("list[ChatCompletionMessageParam]", messages),
        max_tokens=max_tokens,
        temperature=0,  # facts are looked up
        stream=True,
        stream_options={"include_usage": True},
    )
    async with stream:  # whoever stops reading here ends the answer on the server
        async for chunk in stream:
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first_s = first_s or time.perf_counter() - started
                pieces.append(text)
                yield text
            if chunk.usage is not None:
                yield _answer("".join(pieces), chunk, first_s)


def _answer(text: str, last: Any, first_s: float) -> Answer:
    """From a stream's last chunk: OpenAI's usage, and the field `xkv` that only this server has."""
    details = last.usage.prompt_tokens_details
    xkv: dict[str, Any] = last.model_extra.get("xkv") or {}
    miss = xkv.get("miss")
    return Answer(
        text=text,
        artifact=xkv.get("artifact"),
        prefix_tokens=xkv.get("prefix_tokens", 0),
        cached_tokens=details.cached_tokens if details else 0,
        prompt_tokens=last.usage.prompt_tokens,
        miss=None if miss is None else f"{miss['reason']}: {miss['detail']}",
        first_s=first_s,
    )
