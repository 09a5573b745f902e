"""Retrieve a document, then answer over its compressed prefix.

python -m examples.rag "Who is the supervisor of Henry Ivanov?"   compress examples/corpus, serve it, answer
python -m examples.rag --measure                                   all examples/questions: how many are right
python -m examples.rag --base-url http://host:8000/v1 "..."        use a server that runs
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import openai
from openai import AsyncOpenAI

from examples.documents import Documents
from examples.local_server import CORPUS, HERE, STORE, local_server
from examples.rag.measure import known_questions, measure
from examples.rag.pipeline import Pipeline, Reply

QUESTION = "What is the order reference of project Vivid Mountain?"


def main() -> None:
    """Find or start a server, then answer."""
    options = _options()
    documents = Documents(options.docs)
    if not documents.names:
        sys.exit(f"error: no documents in {options.docs}")
    given = options.base_url
    with nullcontext(given) if given else local_server(options.docs, options.store) as base_url:
        asyncio.run(_run(options, base_url, documents))


async def _run(options: argparse.Namespace, base_url: str, documents: Documents) -> None:
    # A local server asks for no key.
    async with AsyncOpenAI(base_url=base_url, api_key=os.environ.get("XKV_API_KEY", "-")) as client:
        model = (await client.models.list()).data[0].id
        pipeline = Pipeline(client, model, documents)
        if options.measure:
            await _measure(pipeline)
        for question in options.questions or ([] if options.measure else [QUESTION]):
            await _answer(pipeline, question)


async def _answer(pipeline: Pipeline, question: str) -> None:
    """Answer, and show what the stored prefix was worth."""
    print(f"\n> {question}")
    found = pipeline.find(question)
    if found is None:
        print("no document has a word of this question")
        return
    stored = await pipeline.reply(question, found)
    print(stored.answer.text)
    print(f"  source: {found.document}: {found.sentence!r}")
    _show("stored prefix", stored)
    _show("the same again, its turn kept", await pipeline.reply(question, found))
    _show("without it", await pipeline.reply_computed(question, found))


def _show(kind: str, reply: Reply) -> None:
    answer = reply.answer
    source = f"artifact {answer.artifact[:12]}" if answer.artifact else answer.miss
    print(
        f"  {kind}: first text after {answer.first_s:.2f} s, {answer.cached_tokens} of "
        f"{answer.prompt_tokens} prompt tokens cached ({source})"
    )


async def _measure(pipeline: Pipeline) -> None:
    known = known_questions(HERE / "questions")
    print(f"{len(known)} questions", flush=True)
    got = await measure(pipeline, known)
    print(
        f"right document: {got.found} of {got.questions}\n"
        f"right answer:   {got.right} of {got.questions}, {got.right_of_found} of {got.found} over the right "
        f"document\n"
        f"cached:         {got.cached:.1%} of the prompt tokens\n"
        f"first text:     {got.stored_s:.2f} s from a prefix in memory, {got.first_use_s:.2f} s when it is "
        f"loaded,\n                {got.computed_s:.2f} s without stored prefixes (medians)"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--measure", action="store_true", help="ask everything in examples/questions")
    parser.add_argument(
        "--base-url", help="of a server that runs; its key in XKV_API_KEY. Default: start one"
    )
    parser.add_argument("--docs", type=Path, default=CORPUS, help="the documents to search")
    parser.add_argument("--store", type=Path, default=STORE, help="of the server that is started")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except openai.APIConnectionError as error:
        sys.exit(f"error: no server at {error.request.url}\nhint: start one: xkv serve")
    except openai.APIError as error:
        sys.exit(f"error: {error.message}")
