"""Render a conversation about a document as tokens: the model's chat template, or plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from xkv_service.modeling.prompts import SEPARATOR, Template, render_prefix


@dataclass(frozen=True)
class Turn:
    """One question and the whole reply to it, its answer prefix included."""

    question: str
    reply: str


@dataclass(frozen=True, eq=False)
class Renderer:
    """Turns documents, questions and replies into token ids.

    Attributes:
        tokenizer: the model's.
        template: "chat" for its chat template: the document opens the first user turn, a blank line and the
            question follow. "raw" for text: document, blank line, "Question: ...", line break, "Answer:"; a
            blank line ends the reply.
        system_prompt: text of the system message, or None for no system message ("raw": put before the
            document, a blank line between).
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template = "chat"
    system_prompt: str | None = None

    def prefix(self, document: str) -> list[int]:
        """The tokens that every conversation about a document starts with.

        Raises:
            InvalidPrompt: see `render_prefix`.
        """
        return render_prefix(
            self.tokenizer, document, system_prompt=self.system_prompt, template=self.template
        )

    def prompt(
        self, document: str, turns: Sequence[Turn], question: str, answer_prefix: str = ""
    ) -> list[int]:
        """The tokens up to where the reply to `question` begins, behind its answer prefix."""
        if self.template == "raw":
            return self._raw(document, turns, question, answer_prefix)
        contents = [text for turn in turns for text in (turn.question, turn.reply)] + [question]
        contents[0] = f"{document}{SEPARATOR}{contents[0]}"
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": text}
            for number, text in enumerate(contents)
        ]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        ids = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            tokenize=True,
            tokenizer_kwargs={"verbose": False},
        )
        return [*ids, *self._encode(answer_prefix)]

    def reply(self, text: str) -> list[int]:
        """The tokens of a whole reply, without what ends a chat's turn; "raw" ends it with a blank line."""
        return self._encode(f" {text}{SEPARATOR}" if self.template == "raw" else text)

    def measure(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self._encode(text))

    def _raw(self, document: str, turns: Sequence[Turn], question: str, answer_prefix: str) -> list[int]:
        said = [f"Question: {turn.question}\nAnswer: {turn.reply}" for turn in turns]
        asked = f"Question: {question}\nAnswer: {answer_prefix}".rstrip()
        parts = [document, *said, asked]
        if self.system_prompt is not None:
            parts.insert(0, self.system_prompt)
        return list(self.tokenizer(SEPARATOR.join(parts), verbose=False).input_ids)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
