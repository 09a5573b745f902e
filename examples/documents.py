"""`Documents`: the texts of a corpus, and how a chat about one begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from xkv_cli.plain_text import escaped
from xkv_workers.corpus import Document, Rejected, list_files, printable, read_file
from xkv_workers.errors import CorpusError


class Message(TypedDict):
    """One message, as OpenAI's API takes it."""

    role: Literal["user", "assistant"]
    content: str


class Documents:
    """Texts by file name, read once. What cannot be read is left out, and named on stderr.

    Args:
        folder: the one that `xkv precompute --docs` compressed.

    Raises:
        CorpusError: there is no such folder, or nothing in it can be read.
    """

    def __init__(self, folder: Path) -> None:
        within = f"{printable(folder.resolve().name)}/"
        self._texts: dict[str, str] = {}
        for found in read_all(folder):
            if isinstance(found, Rejected):
                print(escaped(f"left out {found.uri}: {found.reason}"), file=sys.stderr)
            else:
                self._texts[found.uri.removeprefix(within)] = found.text
        if not self._texts:
            raise CorpusError(f"no document in {folder} can be read", hint="why is said above")

    @property
    def names(self) -> list[str]:
        """Names of all documents, in order."""
        return list(self._texts)

    def text(self, name: str) -> str:
        """The text of one. Raises KeyError."""
        return self._texts[name]

    def prompt(self, name: str, messages: Sequence[Message]) -> list[Message]:
        """A conversation with its document in front, as it is sent to the server. Raises KeyError.

        The document stands first and the question behind it, a blank line between: so every prompt about a
        document begins with the same tokens, which are the ones `xkv precompute` compressed. A question, a
        name or the time of day before the document would make each prompt a new beginning, and nothing
        stored would fit.
        """
        first, *later = messages
        return [{"role": first["role"], "content": f"{self._texts[name]}\n\n{first['content']}"}, *later]


def read_all(path: Path) -> Iterator[Document | Rejected]:
    """A file or folder as precompute reads it: a line end that is translated, say, would make another prefix.

    Raises:
        CorpusError: there is no such file or folder, or nothing to read in it.
    """
    for file in list_files([path]):
        yield from [file] if isinstance(file, Rejected) else read_file(file)
