"""Ask questions about a document on any Transformers cache that already holds it, and mark the answers.

The cache may hold exact keys and values, ones rebuilt from factors, or factors: only the tokens after the
prefix are computed here, so a score shows what the cache's content is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from xkv_service.errors import InvalidPrompt
from xkv_service.modeling.prompts import SEPARATOR

__all__ = ["Chat", "Reply", "accuracy", "ask_each", "ask_in_turn"]


@dataclass(frozen=True)
class Reply:
    """The model's answer to one question, and whether it is the expected one, character for character.

    Attributes:
        text: what the model said.
        right: None when no answer was expected.
    """

    text: str
    right: bool | None


class Chat:
    """A conversation about one document, answered greedily on a cache that starts with its prefix.

    Args:
        model: in evaluation mode; the cache is on its device.
        tokenizer: its tokenizer, with a chat template.
        cache: holds the prefix and nothing else; grows as the chat goes on.
        prefix_ids: the tokens in the cache.
        document: the text that stands first in the first user message.
        system_prompt: text of the system message, or None for no system message.
        max_new_tokens: the longest answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: Cache,
        prefix_ids: Sequence[int],
        document: str,
        *,
        system_prompt: str | None = None,
        max_new_tokens: int = 400,
    ) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.document, self.system_prompt, self.max_new_tokens = document, system_prompt, max_new_tokens
        self._prefix = len(prefix_ids)
        self._held = list(prefix_ids)
        self._turns: list[str] = []

    def ask(self, question: str, expected: str | None = None) -> Reply:
        """Ask the next question.

        With `expected`, its tokens are first checked in one pass: greedy decoding gives them when each is the
        likeliest after those before it. Only another answer is then decoded token by token.

        Raises:
            InvalidPrompt: the rendered chat does not start with the tokens in the cache.
        """
        self._turns.append(question)
        prompt = self._render()
        text = self._confirmed(prompt, expected) if expected is not None else None
        if text is None:
            text = self._decoded(prompt)
        self._turns.append(text)
        return Reply(text, None if expected is None else text == expected)

    def restart(self) -> None:
        """Forget every turn; the cache keeps the prefix."""
        self._turns.clear()
        self._keep(self._prefix)

    def _render(self) -> list[int]:
        first, *later = self._turns
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        contents = [f"{self.document}{SEPARATOR}{first}", *later]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        ids = self.tokenizer.apply_chat_template(
            system + turns, add_generation_prompt=True, return_dict=False, tokenize=True
        )
        if list(ids[: self._prefix]) != self._held[: self._prefix]:
            raise InvalidPrompt(
                "the chat does not start with the tokens in the cache",
                hint="ask with the document, system prompt and template that the prefix was made with",
            )
        return list(ids)

    def _confirmed(self, prompt: list[int], expected: str) -> str | None:
        """`expected` if greedy decoding gives it, and nothing else; the cache then holds it."""
        answer = self.tokenizer(expected, add_special_tokens=False).input_ids
        likeliest = self._run(prompt + answer, len(answer) + 1).argmax(-1).tolist()
        ends = _end_ids(self.model)
        if likeliest[:-1] == answer and likeliest[-1] in ends and not ends.intersection(answer):
            return expected
        return None

    def _decoded(self, prompt: list[int]) -> str:
        ends = _end_ids(self.model)
        answer: list[int] = []
        while len(answer) < self.max_new_tokens:
            token = int(self._run(prompt + answer, 1)[-1].argmax())
            if token in ends:
                break
            answer.append(token)
        return str(self.tokenizer.decode(answer))

    def _run(self, ids: list[int], positions: int) -> torch.Tensor:
        """Logits [positions, vocabulary] behind the last tokens of `ids`; computes what the cache lacks."""
        common = next(
            (i for i, (a, b) in enumerate(zip(self._held, ids, strict=False)) if a != b), len(self._held)
        )
        self._keep(min(common, len(ids) - positions))
        new = torch.tensor([ids[len(self._held) :]], device=self.model.device)
        with torch.no_grad():
            output: Any = self.model(new, past_key_values=self.cache, logits_to_keep=positions)
        self._held = list(ids)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _keep(self, tokens: int) -> None:
        if len(self._held) > tokens:
            self.cache.crop(tokens - len(self._held))
            del self._held[tokens:]


def ask_each(chat: Chat, questions: Iterable[tuple[str, str]]) -> list[Reply]:
    """Ask every (question, expected answer) alone, right behind the document."""
    replies = []
    for question, expected in questions:
        chat.restart()
        replies.append(chat.ask(question, expected))
    return replies


def ask_in_turn(chat: Chat, questions: Iterable[tuple[str, str]]) -> list[Reply]:
    """Ask all (question, expected answer) in one conversation; the model's own answers stay in context."""
    chat.restart()
    return [chat.ask(question, expected) for question, expected in questions]


def accuracy(replies: Sequence[Reply]) -> float:
    """Share of right replies, 0 to 1.

    Raises:
        ValueError: no replies.
    """
    if not replies:
        raise ValueError("no replies to count")
    return sum(reply.right is True for reply in replies) / len(replies)


def _end_ids(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}
