"""A chat backend over compressed documents, with a page to talk to it.

python -m examples.chat_backend                                  compress examples/corpus, serve it, open a page
python -m examples.chat_backend --base-url http://host:8000/v1   use a server that runs
python -m examples.chat_backend --ask "Who ...?" --ask "..."     one conversation in the terminal
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import openai
import uvicorn
from openai import AsyncOpenAI, OpenAI

from examples.chat_backend.app import create_app
from examples.chat_backend.chat import Chat
from examples.chat_backend.conversations import Conversations
from examples.documents import Documents
from examples.local_server import CORPUS, STORE, local_server


def main() -> None:
    """Find or start a server, then talk."""
    options = _options()
    documents = Documents(options.docs)
    if not documents.names:
        sys.exit(f"error: no documents in {options.docs}")
    given = options.base_url
    with nullcontext(given) if given else local_server(options.docs, options.store) as base_url:
        model = OpenAI(base_url=base_url, api_key=_api_key()).models.list().data[0].id
        chat = Chat(AsyncOpenAI(base_url=base_url, api_key=_api_key()), model, documents)
        if options.ask:
            asyncio.run(_ask(chat, options.document or documents.names[0], options.ask))
        else:
            print(f"chat at http://{options.host}:{options.port}/ (Ctrl-C stops it)", flush=True)
            uvicorn.run(create_app(chat), host=options.host, port=options.port, log_level="warning")


async def _ask(chat: Chat, document: str, questions: list[str]) -> None:
    """All questions in one conversation, each answer with where its prompt came from."""
    conversation = Conversations().begin(document)
    for question in questions:
        print(f"\n> {question}")
        async for piece in chat.ask(conversation, question):
            if isinstance(piece, str):
                print(piece, end="", flush=True)
                continue
            turns = piece.cached_tokens - piece.prefix_tokens
            print(
                f"\n  {piece.prefix_tokens} of {piece.prompt_tokens} tokens from factors, {turns} kept from "
                f"earlier turns; first text after {piece.first_s:.2f} s"
                + (f"; {piece.miss}" if piece.miss else "")
            )


def _api_key() -> str:
    """Of the server: a local one asks for none."""
    return os.environ.get("XKV_API_KEY", "-")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-url", help="of a server that runs; its key in XKV_API_KEY. Default: start one"
    )
    parser.add_argument("--docs", type=Path, default=CORPUS, help="the documents to talk about")
    parser.add_argument("--store", type=Path, default=STORE, help="of the server that is started")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="answer here, without a page")
    parser.add_argument("--document", help="for --ask; default: the first one")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except openai.APIConnectionError as error:
        sys.exit(f"error: no server at {error.request.url}\nhint: start one: xkv serve")
    except openai.APIError as error:
        sys.exit(f"error: {error.message}")
