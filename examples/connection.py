"""Which server an example talks to: one that is given, or one that it starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import openai

from examples.documents import Documents
from examples.local_server import CORPUS, STORE, local_server


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """The options that `connection` reads."""
    parser.add_argument(
        "--base-url", help="of a server that runs; its key in XKV_API_KEY. Default: start one"
    )
    parser.add_argument("--docs", type=Path, default=CORPUS, help="the documents to talk about")
    parser.add_argument("--store", type=Path, default=STORE, help="of the server that is started")


def told(error: openai.APIError) -> str:
    """The server's own words; the client's message has the whole body of the answer in it."""
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else error.message


@contextmanager
def connection(options: argparse.Namespace) -> Iterator[tuple[str, str, Documents]]:
    """Base URL and key of the server, and the documents, while the block runs.

    Raises:
        SystemExit: no documents, no server, or one that refuses: with one line that says so.
    """
    documents = Documents(options.docs)
    if not documents.names:
        sys.exit(f"error: no documents in {options.docs}\nhint: txt, md and rst files are read")
    given = options.base_url
    try:
        with nullcontext(given) if given else local_server(options.docs, options.store) as base_url:
            yield base_url, os.environ.get("XKV_API_KEY", "-"), documents  # a local server asks for no key
    except openai.APIConnectionError as error:
        sys.exit(f"error: no server answers at {error.request.url}\nhint: start one with xkv serve")
    except openai.APIError as error:
        sys.exit(f"error: {told(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
