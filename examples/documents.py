"""`Documents`: the texts of a folder, and how a chat about one begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

_KINDS = (".txt", ".md", ".rst")


class Message(TypedDict):
    """One message, as OpenAI's API takes it."""

    role: Literal["user", "assistant"]
    content: str


class Documents:
    """Texts by file name, read once.

    Args:
        folder: the one that `xkv precompute --docs` compressed.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix in _KINDS)
        # Byte for byte what precompute read: a line end that is translated would be another prefix.
        self._texts = {str(path.relative_to(folder)): path.read_bytes().decode("utf-8-sig") for path in paths}

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
