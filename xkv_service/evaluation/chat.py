"""Ask questions about a document on any Transformers cache that already holds it, and mark the answers.

The cache may hold exact keys and values, ones rebuilt from factors, or factors: only the tokens after the
prefix are computed here, so a score shows what the cache's content is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from xkv_service.errors import InvalidPrompt
from xkv_service.evaluation.greedy import Greedy, decode
from xkv_service.evaluation.rendering import Renderer, Turn
from xkv_service.modeling.prompts import SEPARATOR, Template

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
        tokenizer: its tokenizer.
        cache: holds the prefix and nothing else; grows as the chat goes on.
        prefix_ids: the tokens in the cache.
        document: the text that stands first in the first user message.
        system_prompt: text of the system message, or None for no system message.
        template: "chat" for the tokenizer's chat template, or "raw" for plain text.
        max_new_tokens: the longest answer.
        fresh: makes another cache that holds the prefix (see `Greedy`).
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
        template: Template = "chat",
        max_new_tokens: int = 400,
        fresh: Callable[[], Cache] | None = None,
    ) -> None:
        self.renderer = Renderer(tokenizer, template, system_prompt)
        self.document, self.max_new_tokens = document, max_new_tokens
        self.greedy = Greedy(model, cache, prefix_ids, fresh)
        self.turns: list[Turn] = []

    def ask(
        self,
        question: str,
        expected: str | None = None,
        *,
        answer_prefix: str = "",
        enough: Callable[[str], bool] = lambda text: False,
    ) -> Reply:
        """Ask the next question.

        With `expected`, its tokens are first checked in one pass: greedy decoding gives them when each is the
        likeliest after those before it. Only another answer is then decoded token by token.

        Args:
            question: text of the user's turn.
            expected: the whole answer, if it is known.
            answer_prefix: how the answer begins; given to the model, not part of the reply.
            enough: whether a reply need not go on.

        Raises:
            InvalidPrompt: the rendered chat does not start with the tokens in the cache.
        """
        prompt = self.renderer.prompt(self.document, self.turns, question, answer_prefix)
        if prompt[: len(self.greedy.prefix)] != self.greedy.prefix:
            raise InvalidPrompt(
                "the chat does not start with the tokens in the cache",
                hint="ask with the document, system prompt and template that the prefix was made with",
            )
        if expected is not None and self._confirmed(prompt, expected):
            text = expected
        else:
            text = self._decoded(prompt, enough)
        gap = " " if answer_prefix and not text[:1].isspace() else ""
        self.turns.append(Turn(question, f"{answer_prefix}{gap}{text}"))
        return Reply(text, None if expected is None else text == expected)

    def restart(self) -> None:
        """Forget every turn; the cache keeps the prefix."""
        self.turns.clear()
        self.greedy.keep(len(self.greedy.prefix))

    def _confirmed(self, prompt: list[int], expected: str) -> bool:
        ended = self.renderer.template == "chat"
        return self.greedy.confirms(prompt, self.renderer.reply(expected), ended=ended)

    def _decoded(self, prompt: list[int], enough: Callable[[str], bool]) -> str:
        tokenizer, raw = self.renderer.tokenizer, self.renderer.template == "raw"

        def ended(text: str) -> bool:
            return enough(text) or (raw and SEPARATOR in text.lstrip())

        text = decode(
            self.greedy.tokens(prompt), lambda ids: str(tokenizer.decode(ids)), self.max_new_tokens, ended
        )
        return text.lstrip().split(SEPARATOR)[0] if raw else text


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
