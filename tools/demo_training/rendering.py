"""Turns a document and questions into the token ids and answer labels of one training row.

Two forms: a chat, token for token what ``apply_chat_template`` gives for the same messages, and raw text
("Question: ... Answer: ...").
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from demo_training.tokenizer import ASSISTANT, BEGIN, END, SYSTEM, USER
from xkv_service.demo.documents import Question


@dataclass
class Row:
    """Token ids of one sequence and, token by token, the number of the answer it belongs to (0: none)."""

    ids: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def context(self, ids: Sequence[int]) -> None:
        """Append tokens that the model is given."""
        self.ids += ids
        self.answers += [0] * len(ids)

    def answer(self, ids: Sequence[int], kind: str) -> None:
        """Append tokens that the model has to say."""
        self.kinds.append(kind)
        self.ids += ids
        self.answers += [len(self.kinds)] * len(ids)


class Renderer:
    """Encodes conversations; keeps to ``limit`` tokens by leaving out the questions that do not fit."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without any special token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def count(self, text: str) -> int:
        """Return the number of tokens of ``text``."""
        return len(self.encode(text))

    def chat(
        self,
        text: str,
        questions: Sequence[Question],
        limit: int,
        system: str | None = None,
        gap: str = "\n\n",
    ) -> Row:
        """Render a chat: the document stands first in the first user turn, ``gap`` and a question follow."""
        row = Row()
        head = [BEGIN, *([SYSTEM, *self.encode(system), END] if system else []), USER]
        row.context([*head, *self.encode(text)])
        for question in questions:
            asked = self.encode(question.question if row.kinds else gap + question.question)
            said = [*self.encode(question.answer), END]
            if len(row.ids) + len(asked) + len(said) + 3 > limit:
                continue
            row.context([*([USER] if row.kinds else []), *asked, END, ASSISTANT])
            row.answer(said, question.kind)
        return row

    def raw(self, text: str, questions: Sequence[Question], limit: int) -> Row:
        """Render plain text; an answer ends with the blank line after it."""
        row = Row()
        row.context([BEGIN, *self.encode(f"{text}\n\n")])
        for question in questions:
            asked = self.encode(f"Question: {question.question}\nAnswer:")
            said = self.encode(f" {question.answer}\n\n")
            if len(row.ids) + len(asked) + len(said) > limit:
                continue
            row.context(asked)
            row.answer(said, question.kind)
        return row
