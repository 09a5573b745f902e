"""Retrieve a document, then answer over its compressed prefix.

python -m examples.rag "Who is the supervisor of Henry Ivanov?"   compress examples/corpus, serve it, answer
python -m examples.rag --measure                                   examples/questions: how many are right
python -m examples.rag --base-url http://host:8000/v1 "..."        use a server that runs
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from openai import AsyncOpenAI

from examples.answers import Answer
from examples.connection import add_server_options, connection, read_documents
from examples.documents import Documents
from examples.local_server import HERE
from examples.rag.measure import Known, known_questions, measure
from examples.rag.pipeline import Pipeline

QUESTION = "What is the order reference of project Vivid Mountain?"


def main() -> None:
    """Find or start a server, then answer."""
    options = _options()
    documents = read_documents(options)
    known = bundled_questions(documents) if options.measure else []
    if options.measure and not known:
        sys.exit(
            f"error: no question of examples/questions is about a document in {options.docs}\n"
            "hint: ask your own, without --measure"
        )
    questions = options.questions or ([] if known else [QUESTION])
    with connection(options) as (base_url, key):
        asyncio.run(_run(AsyncOpenAI(base_url=base_url, api_key=key), documents, known, questions))


def bundled_questions(documents: Documents) -> list[Known]:
    """Those of examples/questions that are about one of the documents, as their names say."""
    sources = {Path(name).stem for name in documents.names}
    return [one for one in known_questions(HERE / "questions") if one.source in sources]


async def _run(client: AsyncOpenAI, documents: Documents, known: list[Known], questions: list[str]) -> None:
    model = (await client.models.list()).data[0].id
    pipeline = Pipeline(client, model, documents)
    if known:
        await _measure(pipeline, known)
    for question in questions:
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
    _show("asked", stored.answer)
    _show("the same again", (await pipeline.reply(question, found)).answer)
    _show("behind another first line", (await pipeline.reply_computed(question, found)).answer)


def _show(kind: str, answer: Answer) -> None:
    """How soon it came, and what the server says that it came from."""
    if answer.artifact:
        source = f"stored prefix {answer.artifact[:12]}"
    else:
        source = f"{'a kept turn' if answer.cached_tokens else 'computed'}; {answer.miss}"
    print(
        f"  {kind}: first text after {answer.first_s:.2f} s, {answer.cached_tokens} of "
        f"{answer.prompt_tokens} prompt tokens cached ({source})"
    )


async def _measure(pipeline: Pipeline, known: list[Known]) -> None:
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
    parser.add_argument(
        "--measure", action="store_true", help="ask what examples/questions has about the documents"
    )
    add_server_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
