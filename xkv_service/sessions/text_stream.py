"""From tokens to text as they come: whole characters only, and nothing of a text that stops the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns tokens into pieces of text that, joined, are the text of them all.

    A character may take several tokens, and a tokenizer may write a token differently behind another: so a
    few tokens before the new one are decoded with it.

    Args:
        decode: token ids to text.
        stops: texts that end the answer.
        strip: whether the answer's leading white space is left out.

    Attributes:
        text: what was told so far.
        stopped: whether a stop was met.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str] = (), *, strip: bool = False
    ) -> None:
        self._decode, self._stops, self._strip = decode, tuple(stops), strip
        self._ids: list[int] = []
        self._start = self._done = self._told = 0
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character or a stop may be incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        whole = text.removesuffix(_INCOMPLETE)
        piece, self._told = whole[self._told :], max(self._told, len(whole))
        if whole == text:
            self._start, self._done = self._done, len(self._ids)
            self._told = len(self._decode(self._ids[self._start :]))
        return self._tell(piece)

    def flush(self) -> str:
        """What was held back, when no token will follow."""
        rest = self._decode(self._ids[self._start :])[self._told :]
        self._told += len(rest)
        return self._tell(rest, final=True)

    def _tell(self, piece: str, *, final: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        if self._strip and not self.text:
            text = text.lstrip()
        cut = min((at for at in map(text.find, self._stops) if at >= 0), default=None)
        if cut is not None:
            self.stopped, self._held, text = True, "", text[:cut]
        else:
            kept = len(text) if final else len(text) - self._beginnings(text)
            text, self._held = text[:kept], text[kept:]
        self.text += text
        return text

    def _beginnings(self, text: str) -> int:
        """Characters at the end of `text` that a stop may begin with."""
        longest = 0
        for stop in self._stops:
            for size in range(1, min(len(stop) - 1, len(text)) + 1):
                if text.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest
