"""From a file's bytes to documents' texts, one reader per kind of file. The bytes are untrusted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from xkv_workers.errors import BadDocument, one_line

MAX_DOCUMENT_BYTES = 64 * 2**20
"""A document above this is refused unread: no model's window holds 16 million tokens of text."""

MAX_ID_LETTERS = 512

_HTML_UNSEEN = ("script", "style", "template", "noscript", "head")


def read_verbatim(path: Path) -> str:
    """The text of a txt, md or rst file as it is, less a byte order mark.

    Raises:
        BadDocument: too large, binary, or not UTF-8.
    """
    return decode(_read_limited(path))


def read_html(path: Path) -> str:
    """The visible text of an HTML page, one line per block.

    Raises:
        BadDocument: too large, binary, not UTF-8, or nested too deeply.
    """
    from bs4 import BeautifulSoup

    markup = decode(_read_limited(path))
    try:
        soup = BeautifulSoup(markup, "html.parser")
        for hidden in soup(list(_HTML_UNSEEN)):
            hidden.decompose()
        lines = (line.strip() for line in soup.get_text("\n").splitlines())
    except RecursionError:
        raise BadDocument("the HTML is nested too deeply to be read") from None
    return "\n".join(line for line in lines if line)


def read_pdf(path: Path) -> str:
    """The text of a PDF's pages, a blank line between pages. Needs the extra `pdf`.

    Raises:
        BadDocument: pypdf is missing, or the file is too large, damaged, locked or holds no text.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise BadDocument(
            "reading PDF needs pypdf, which is not installed", hint="pip install 'xkv-service[pdf]'"
        ) from None
    content = _read_limited(path)
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what is wrong with the file is told here
    try:
        reader = PdfReader(BytesIO(content))
        if reader.is_encrypted:
            raise BadDocument("the PDF is protected by a password", hint="remove the protection first")
        pages = [page.extract_text() for page in reader.pages]
    except (PyPdfError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # pypdf lets these through on damaged files, besides its own errors.
        raise BadDocument(f"not a readable PDF: {one_line(error)}") from None
    text = "\n\n".join(page.strip() for page in pages).strip()
    if not text:
        raise BadDocument("the PDF holds no text", hint="scanned pages need OCR first")
    return text


def read_jsonl(path: Path) -> Iterator[tuple[str, str | BadDocument]]:
    """(id, text) of each line `{"id": ..., "text": ...}`; a bad line gives ("line N", the error)."""
    with path.open("rb") as lines:
        number = 0
        while raw := lines.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if len(raw) > MAX_DOCUMENT_BYTES:
                yield (
                    f"line {number}",
                    BadDocument("over 64 MiB; reading stops here"),
                )
                return
            if not raw.strip():
                continue
            try:
                yield _record(raw)
            except BadDocument as error:
                yield f"line {number}", error


def _record(raw: bytes) -> tuple[str, str]:
    try:
        record: Any = json.loads(decode(raw))
    except json.JSONDecodeError as error:
        raise BadDocument(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadDocument("nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadDocument(f"not JSON: {one_line(error)}") from None
    if not isinstance(record, dict):
        raise BadDocument('not an object with "id" and "text"')
    name, text = record.get("id"), record.get("text")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        raise BadDocument('no "id"')
    if len(name) > MAX_ID_LETTERS or not name.isprintable():
        raise BadDocument('the "id" is too long or not printable')
    if not isinstance(text, str):
        raise BadDocument('no "text"' if text is None else '"text" is not a string')
    return name, text


def decode(content: bytes) -> str:
    """UTF-8 text without a byte order mark.

    Raises:
        BadDocument: NUL bytes, or bytes that are not UTF-8.
    """
    if b"\0" in content:
        raise BadDocument("binary data (NUL bytes), not text", hint="save it as UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocument(
            f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}", hint="save it as UTF-8"
        ) from None


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as source:
        content = source.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise BadDocument("larger than 64 MiB", hint="split it into documents that fit the model's window")
    return content


READERS: dict[str, Callable[[Path], str]] = {
    ".txt": read_verbatim,
    ".md": read_verbatim,
    ".rst": read_verbatim,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}
SUFFIXES = (*READERS, ".jsonl")
"""Every kind of file that is read; others in a folder are left alone."""
