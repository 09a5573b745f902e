"""Users of a server under traffic: conversations, some that leave in the middle, and bad requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

_PATIENCE_S = 120
_BAD: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": "hello"},
]


async def use(url: str, plan: Path, answers_file: Path, seconds: float, rate: float, seed: int) -> None:
    """Conversations begin `rate` times a second; writes what each request came to.

    Args:
        plan: JSON of the documents: text and questions; the first is asked about most.
    """
    from openai import AsyncOpenAI

    documents, dice = json.loads(plan.read_text()), random.Random(seed)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=_PATIENCE_S)
    model = (await client.models.list()).data[0].id
    weights = [1 / (rank + 1) for rank in range(len(documents))]
    talks, answers, end = [], [], time.monotonic() + seconds
    while time.monotonic() < end:
        document = dice.choices(documents, weights)[0]
        talks.append(
            asyncio.create_task(_talk(client, model, document, random.Random(dice.random()), answers))
        )
        await asyncio.sleep(dice.expovariate(rate))
    await asyncio.gather(*talks)
    answers_file.write_text(json.dumps(answers))


async def _talk(client: Any, model: str, document: Any, dice: random.Random, answers: list[Any]) -> None:
    if dice.random() < 0.08:
        answers.append(await _bad(client, model, dice))
        return
    messages: list[dict[str, str]] = []
    for _ in range(dice.choice([1, 1, 2, 3, 4])):
        question = dice.choice(document["questions"])
        content = question if messages else f"{document['text']}\n\n{question}"
        messages = [*messages, {"role": "user", "content": content}]
        answer = await _request(client, model, messages, leave=dice.random() < 0.1)
        answers.append(answer)
        if answer["end"] != "answered":
            return
        messages = [*messages, {"role": "assistant", "content": answer["text"]}]
        await asyncio.sleep(dice.expovariate(2.0))


async def _bad(client: Any, model: str, dice: random.Random) -> dict[str, Any]:
    import httpx

    began = time.monotonic()
    async with httpx.AsyncClient(timeout=60) as plain:
        url = f"{str(client.base_url).rstrip('/')}/chat/completions"
        answer = await plain.post(url, json={"model": model, **dice.choice(_BAD)})
    end = "refused" if 400 <= answer.status_code < 500 and answer.json()["error"]["message"] else "broken"
    return {"end": end, "seconds": time.monotonic() - began}


async def _request(client: Any, model: str, messages: list[dict[str, str]], *, leave: bool) -> dict[str, Any]:
    """One request, when it began (by the machine's monotonic clock), and how it ended.

    answered; left; error: the server said what went wrong, by a status or an event of the stream; hang: there
    was no end after `_PATIENCE_S`; broken: anything else, a refused or lost connection among it.
    """
    import httpx
    import openai

    began = time.monotonic()
    found: dict[str, Any] = {"messages": messages, "began": began}
    try:
        async with asyncio.timeout(_PATIENCE_S):
            found |= await _answer(client, model, messages, leave=leave)
    except (TimeoutError, openai.APITimeoutError, httpx.TimeoutException):
        found |= {"end": "hang"}
    except (openai.APIConnectionError, httpx.HTTPError) as error:
        found |= {"end": "broken", "error": repr(error)[:200]}
    except openai.APIError as error:
        found |= {"end": "error", "error": str(error)[:200]}
    return {**found, "seconds": time.monotonic() - began}


async def _answer(client: Any, model: str, messages: list[dict[str, str]], *, leave: bool) -> dict[str, Any]:
    began, first, text, last, pieces = time.monotonic(), None, "", None, 0
    stream = await client.chat.completions.create(
        model=model,
        messages=messages,
        stream=True,
        max_tokens=48,
        temperature=0,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        last = chunk
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic()
            text += chunk.choices[0].delta.content
            pieces += 1
            if leave and pieces == 3:
                await stream.close()
                return {"end": "left"}
    if last is None or last.usage is None:
        return {"end": "broken"}
    return {
        "end": "answered",
        "text": text,
        "first_token_s": (first or time.monotonic()) - began,
        "prompt": last.usage.prompt_tokens,
        "cached": last.usage.prompt_tokens_details.cached_tokens,
        "xkv": last.model_extra["xkv"],
    }
