"""`Retriever`: which document answers a question. BM25 over sentences; no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import bm25s

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")
_WORD = re.compile(r"\d+(?:[.-]\d+)+|\w+")
"""Numbers like 9.26 are one word: cut in two, room 9.26 would be room 9.17 or 2.26 as well."""


@dataclass(frozen=True)
class Found:
    """Where the question's words are.

    Args:
        document: its name. sentence: the best one in it. score: BM25's.
    """

    document: str
    sentence: str
    score: float


class Retriever:
    """Finds the sentence that shares most with a question, and gives the document that it stands in.

    Sentences find the right one of the example's documents for 484 of 491 questions, paragraphs for 481 and
    whole documents for 450; 6 of the 7 others are about rooms that stand in two documents.

    Args:
        texts: by document name, at least one word in all of them.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._sentences = [
            (name, sentence)
            for name, text in texts.items()
            for sentence in _SENTENCE_END.split(text)
            if _words(sentence)
        ]
        self._index = bm25s.BM25()
        self._index.index([_words(sentence) for _, sentence in self._sentences], show_progress=False)

    def find(self, question: str) -> Found | None:
        """The document for a question; None where no word of it is anywhere."""
        words = _words(question)
        scores = self._index.get_scores(words) if words else None
        if scores is None or not scores.max() > 0:
            return None
        best = int(scores.argmax())
        document, sentence = self._sentences[best]
        return Found(document, sentence, float(scores[best]))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
