"""`Answer`: one answer in the making, token by token."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from typing import TypeAlias

from xkv_artifacts import prefix_index
from xkv_artifacts.keys import token_bytes
from xkv_service.sessions.context import Context
from xkv_service.sessions.reply import Finish, Reply
from xkv_service.sessions.sampling import Sampler
from xkv_service.sessions.settings import GenerationSettings
from xkv_service.sessions.text_stream import TextStream

Ids: TypeAlias = "list[int] | array[int]"


class Answer:
    """Decodes an answer to a prompt.

    Args:
        context: what is held; whatever of it the prompt does not continue is forgotten first.
        prompt: longer than the prefix, and begins with it.
        settings: how to decode.
        ends: tokens that end an answer. text: turns tokens into text.

    Attributes:
        finish: how it ended, "interrupted" until it did.
    """

    def __init__(
        self,
        context: Context,
        prompt: list[int],
        settings: GenerationSettings,
        *,
        ends: frozenset[int],
        text: TextStream,
    ) -> None:
        self.context, self.prompt, self.text = context, prompt, text
        self._sample, self._most, self._ends = Sampler(settings), settings.max_new_tokens, ends
        self.finish: Finish = "interrupted"
        self.tokens = 0
        self.cached = self.dropped = 0
        self._rebuilt: list[float] = []
        self._started = time.perf_counter()
        self._first_token = self._ended = 0.0

    def pieces(self) -> Iterator[str]:
        """The answer's text as it comes."""
        try:
            with self.context.enabled():
                yield from self._decoded()
                if rest := self.text.flush():
                    yield rest
        finally:
            self._ended = time.perf_counter()

    def reply(self) -> Reply:
        """The answer as far as it came."""
        seconds = self._ended - self._started
        return Reply(
            text=self.text.text,
            finish=self.finish,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            dropped_tokens=self.dropped,
            generated_tokens=self.tokens,
            rebuilt_tokens=self._mean_rebuilt(),
            seconds=seconds,
            first_token_seconds=self._first_token - self._started if self._first_token else seconds,
        )

    def _decoded(self) -> Iterator[str]:
        token = self._run_prompt()
        while token not in self._ends:
            self.tokens += 1
            if piece := self.text.push(token):
                yield piece
            if self.text.stopped:
                break
            if self.tokens >= self._most:
                self.finish = "length"
                return
            token = self._step([token])
        self.finish = "stop"

    def _run_prompt(self) -> int:
        """Keep what is held of the prompt, compute the rest, and choose the first token."""
        held = len(self.context.ids)
        self.context.rewind(min(common_tokens(self.context.ids, self.prompt), len(self.prompt) - 1))
        self.cached = len(self.context.ids)
        self.dropped = held - self.cached
        token = self._step(self.prompt[self.cached :])
        self._first_token = time.perf_counter()
        return token

    def _mean_rebuilt(self) -> float:
        """Of the single steps; those of the prompt's tokens, which are rebuilt together, only without any."""
        counts = self._rebuilt[1:] or self._rebuilt
        return sum(counts) / len(counts) if counts else 0.0

    def _step(self, ids: list[int]) -> int:
        token = self._sample(self.context.advance(ids))
        self._rebuilt.append(self.context.rebuilt_tokens)
        return token


def common_tokens(left: Ids, right: Ids) -> int:
    """Tokens that two sequences begin with alike."""
    if right[: len(left)] == left:  # of the same kind, and the most frequent case
        return len(left)
    return prefix_index.common_tokens(token_bytes(left), token_bytes(right))
