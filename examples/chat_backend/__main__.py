"""A chat backend over compressed documents, with a page to talk to it.

python -m examples.chat_backend                                  compress examples/corpus, serve it and a page
python -m examples.chat_backend --base-url http://host:8000/v1   use a server that runs
python -m examples.chat_backend --ask "Who ...?" --ask "..."     one conversation in the terminal
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import uvicorn
from openai import AsyncOpenAI, OpenAI

from examples.answers import Answer
from examples.chat_backend.app import create_app
from examples.chat_backend.chat import Chat
from examples.chat_backend.conversations import Conversations
from examples.connection import add_server_options, connection, read_documents


def main() -> None:
    """Find or start a server, then talk."""
    options = _options()
    documents = read_documents(options)
    document = options.document or documents.names[0]
    if document not in documents.names:
        sys.exit(f"error: no document {document!r}\nhint: there are {', '.join(documents.names)}")
    with connection(options) as (base_url, key):
        model = OpenAI(base_url=base_url, api_key=key).models.list().data[0].id
        chat = Chat(AsyncOpenAI(base_url=base_url, api_key=key), model, documents)
        if options.ask:
            asyncio.run(_ask(chat, document, options.ask))
        else:
            place = f"http://{options.host}:{options.port}/"
            print(f"chat at {place} over {model} at {base_url} (Ctrl-C stops it)", flush=True)
            uvicorn.run(create_app(chat), host=options.host, port=options.port, log_level="warning")


async def _ask(chat: Chat, document: str, questions: list[str]) -> None:
    """All questions in one conversation, each answer with where its prompt came from."""
    conversation = Conversations().begin(document)
    for question in questions:
        print(f"\n> {question}")
        async for piece in chat.ask(conversation, question):
            print(piece if isinstance(piece, str) else _source(piece), end="", flush=True)


def _source(answer: Answer) -> str:
    turns = answer.cached_tokens - answer.prefix_tokens
    miss = f"; {answer.miss}" if answer.miss else ""
    return (
        f"\n  {answer.prefix_tokens} of {answer.prompt_tokens} tokens from factors, {turns} kept from "
        f"earlier turns; first text after {answer.first_s:.2f} s{miss}\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="answer here, without a page")
    parser.add_argument("--document", metavar="NAME", help="for --ask; default: the first one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
