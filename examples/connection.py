"""Which server an example talks to: one that is given, or one that it starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import openai

from examples.documents import Documents, read_all
from examples.local_server import CORPUS, STORE, local_server
from xkv_workers.corpus import Rejected
from xkv_workers.errors import CorpusError

_DOCUMENT = CORPUS / "guide-cork-ivory-gull-union.md"
_QUESTION = "Do you know the supplier of the eager eagle lamp?"
BROKEN_OFF = "the server broke the answer off"


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options that `read_documents` and `connection` read."""
    parser.add_argument(
        "--base-url", help="of a server that runs; its key in XKV_API_KEY. Default: start one"
    )
    parser.add_argument("--docs", type=Path, default=CORPUS, help="the documents to talk about")
    parser.add_argument("--store", type=Path, default=STORE, help="of the server that is started")


def parse_question(description: str | None) -> argparse.Namespace:
    """The options of an example that asks one question about one document: question, document (its text),
    base_url and model.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", default=_QUESTION)
    parser.add_argument("--document", type=_text, default=str(_DOCUMENT), metavar="FILE")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="model", help="as /v1/models names it")
    return parser.parse_args()


def _text(path: str) -> str:
    """Of one document, as `xkv precompute` reads it."""
    try:
        found = list(read_all(Path(path)))
    except CorpusError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{path} has {len(found)} documents: name a file with one")
    [document] = found
    if isinstance(document, Rejected):
        raise argparse.ArgumentTypeError(f"{path}: {document.reason}")
    return document.text


def told(error: openai.APIError) -> str:
    """The server's own words; the client's message has the whole body of the answer in it."""
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else error.message


def read_documents(options: argparse.Namespace) -> Documents:
    """The documents to talk about.

    Raises:
        SystemExit: there are none, with one line that says so.
    """
    try:
        return Documents(options.docs)
    except CorpusError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


@contextmanager
def connection(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Base URL and key of the server, while the block runs.

    Raises:
        SystemExit: no server, or one that refuses: with one line that says so.
    """
    given = options.base_url
    with (
        plain_errors(),
        nullcontext(given) if given else local_server(options.docs, options.store) as base_url,
    ):
        yield base_url, api_key()


def api_key() -> str:
    """What XKV_API_KEY says; a local server asks for none, but clients want one."""
    return os.environ.get("XKV_API_KEY", "-")


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend ends the block with one line that says so.

    Raises:
        SystemExit: no server, one that refuses or dies while it answers, or Ctrl-C.
    """
    try:
        yield
    except openai.APIConnectionError as error:
        sys.exit(f"error: no server answers at {error.request.url}\nhint: start one with xkv serve")
    except openai.APIError as error:
        sys.exit(f"error: {told(error)}")
    except httpx.TransportError:  # the client makes none of its own errors of what breaks off a stream
        print()  # ends the line of the half answer
        sys.exit(f"error: {BROKEN_OFF}\nhint: see that it still runs, and ask again")
    except KeyboardInterrupt:
        sys.exit(130)
