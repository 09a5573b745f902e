"""How often the right document is found and the right answer given, and how soon it begins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from examples.rag.pipeline import Pipeline, Reply

_AT_ONCE = 4
_TIMED = 50


@dataclass(frozen=True)
class Known:
    """A question whose document (less its ending) and answer are known."""

    source: str
    question: str
    answer: str


@dataclass(frozen=True)
class Measured:
    """Counts, and seconds to the first text: medians.

    Args:
        found: right documents. right: right answers. right_of_found: of those with the right document.
        cached: share of all prompt tokens that was not computed.
        stored_s: from a prefix in memory. first_use_s: each document's first question, which loads it.
        computed_s: of the same questions as `first_use_s`, without stored prefixes.
    """

    questions: int
    found: int
    right: int
    right_of_found: int
    cached: float
    stored_s: float
    first_use_s: float
    computed_s: float


def known_questions(folder: Path) -> list[Known]:
    """All questions of a folder with one `NAME.questions.jsonl` a document."""
    return [
        Known(path.name.removesuffix(".questions.jsonl"), record["question"], record["answer"])
        for path in sorted(folder.glob("*.questions.jsonl"))
        for record in map(json.loads, path.read_text("utf-8").splitlines())
    ]


async def measure(pipeline: Pipeline, known: list[Known]) -> Measured:
    """Ask everything: each document's first question alone, with and without its prefix, then some others
    alone for their times (in a batch each waits for the rest), and the rest together.

    Raises as `stream_answer`.
    """
    firsts = list({one.source: one for one in reversed(known)}.values())
    loading = [await _ask(pipeline, one) for one in firsts]
    computed = [
        await pipeline.reply_computed(one.question, reply.found) for one, reply in _zip(firsts, loading)
    ]
    others = [one for one in known if one not in firsts]
    timed = others[:: max(1, len(others) // _TIMED)]
    resident = [await _ask(pipeline, one) for one in timed]
    gate = asyncio.Semaphore(_AT_ONCE)

    async def queued(one: Known) -> Reply:
        async with gate:
            return await _ask(pipeline, one)

    rest = [one for one in others if one not in timed]
    together = await asyncio.gather(*map(queued, rest))
    replies = dict(_zip([*firsts, *timed, *rest], [*loading, *resident, *together]))
    found = [one for one, reply in replies.items() if Path(reply.found.document).stem == one.source]
    right = [one for one, reply in replies.items() if reply.answer.text.strip() == one.answer.strip()]
    cached = sum(reply.answer.cached_tokens for reply in replies.values())
    return Measured(
        questions=len(replies),
        found=len(found),
        right=len(right),
        right_of_found=len(set(right) & set(found)),
        cached=cached / sum(reply.answer.prompt_tokens for reply in replies.values()),
        stored_s=median(reply.answer.first_s for reply in resident),
        first_use_s=median(reply.answer.first_s for reply in loading),
        computed_s=median(reply.answer.first_s for reply in computed),
    )


def _zip(asked: list[Known], replies: list[Reply]) -> Iterable[tuple[Known, Reply]]:
    return zip(asked, replies, strict=True)


async def _ask(pipeline: Pipeline, one: Known) -> Reply:
    found = pipeline.find(one.question)
    assert found is not None, f"no document has a word of {one.question!r}"
    return await pipeline.reply(one.question, found)
