"""`ChatFormat` and `CompletionFormat`: an answer's events as the two endpoints tell them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from pydantic import BaseModel

from xkv_service.api.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChosenToken,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    DeltaMessage,
    FinishReason,
    ServedFrom,
    TopToken,
    Usage,
)
from xkv_service.api.model import ServedModel
from xkv_service.engine.messages import Delta, TokenLogprob

_INCOMPLETE = "\ufffd"


class Format(Protocol):
    """Makes what is sent of an answer. One object an answer."""

    def opening(self) -> Iterator[BaseModel]:
        """Chunks that begin a stream."""

    def piece(self, delta: Delta) -> BaseModel:
        """The chunk of some more text."""

    def closing(self, finish: FinishReason, xkv: ServedFrom, usage: Usage | None) -> Iterator[BaseModel]:
        """Chunks that end a stream."""

    def whole(
        self, deltas: Sequence[Delta], finish: FinishReason, xkv: ServedFrom, usage: Usage
    ) -> BaseModel:
        """The answer that is not streamed."""


class ChatFormat:
    """Answers of /v1/chat/completions.

    Args:
        name: of the answer. model: whose it is. asked: the name that the request gave the model.
        logprobs: whether they were asked for.
    """

    def __init__(self, name: str, model: ServedModel, asked: str, logprobs: bool) -> None:
        self._id, self._model, self._asked, self._logprobs = f"chatcmpl-{name}", model, asked, logprobs
        self._created = int(time.time())

    def opening(self) -> Iterator[BaseModel]:
        """As `Format`."""
        yield self._chunk([self._choice(DeltaMessage(role="assistant", content=""))])

    def piece(self, delta: Delta) -> BaseModel:
        """As `Format`."""
        return self._chunk([self._choice(DeltaMessage(content=delta.text), delta.logprobs)])

    def closing(self, finish: FinishReason, xkv: ServedFrom, usage: Usage | None) -> Iterator[BaseModel]:
        """As `Format`."""
        end = self._chunk([self._choice(DeltaMessage(), finish=finish)])
        if usage is None:
            end.xkv = xkv
            yield end
            return
        yield end
        last = self._chunk([])
        last.usage, last.xkv = usage, xkv
        yield last

    def whole(
        self, deltas: Sequence[Delta], finish: FinishReason, xkv: ServedFrom, usage: Usage
    ) -> ChatCompletion:
        """As `Format`."""
        message = AnswerMessage(role="assistant", content="".join(d.text for d in deltas), refusal=None)
        logprobs = self._logprobs_of([entry for delta in deltas for entry in delta.logprobs])
        choice = ChatChoice(index=0, message=message, logprobs=logprobs, finish_reason=finish)
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._asked,
            choices=[choice],
            usage=usage,
            xkv=xkv,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._asked,
            choices=choices,
        )

    def _choice(
        self,
        delta: DeltaMessage,
        entries: Sequence[TokenLogprob] = (),
        finish: FinishReason | None = None,
    ) -> ChatChunkChoice:
        logprobs = self._logprobs_of(entries) if entries else None
        return ChatChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish)

    def _logprobs_of(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(content=[self._chosen(entry) for entry in entries], refusal=None)

    def _chosen(self, entry: TokenLogprob) -> ChosenToken:
        top = [self._top(token, logprob) for token, logprob in entry.top]
        own = self._top(entry.token_id, entry.logprob)
        return ChosenToken(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _top(self, token: int, logprob: float) -> TopToken:
        text = self._model.text_of(token)
        return TopToken(
            token=text, logprob=logprob, bytes=None if _INCOMPLETE in text else list(text.encode())
        )


class CompletionFormat:
    """Answers of /v1/completions. Arguments as `ChatFormat`."""

    def __init__(self, name: str, model: ServedModel, asked: str, logprobs: bool) -> None:
        self._id, self._model, self._asked, self._logprobs = f"cmpl-{name}", model, asked, logprobs
        self._created = int(time.time())
        self._offset = 0

    def opening(self) -> Iterator[BaseModel]:
        """As `Format`: nothing."""
        yield from ()

    def piece(self, delta: Delta) -> BaseModel:
        """As `Format`."""
        return self._completion([self._choice(delta.text, delta.logprobs, None)])

    def closing(self, finish: FinishReason, xkv: ServedFrom, usage: Usage | None) -> Iterator[BaseModel]:
        """As `Format`."""
        end = self._completion([self._choice("", (), finish)])
        if usage is None:
            end.xkv = xkv
            yield end
            return
        yield end
        last = self._completion([])
        last.usage, last.xkv = usage, xkv
        yield last

    def whole(
        self, deltas: Sequence[Delta], finish: FinishReason, xkv: ServedFrom, usage: Usage
    ) -> Completion:
        """As `Format`."""
        text = "".join(delta.text for delta in deltas)
        answer = self._completion([self._choice(text, [e for d in deltas for e in d.logprobs], finish)])
        answer.usage, answer.xkv = usage, xkv
        return answer

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._asked,
            choices=choices,
        )

    def _choice(
        self, text: str, entries: Sequence[TokenLogprob], finish: FinishReason | None
    ) -> CompletionChoice:
        logprobs = self._logprobs_of(entries) if self._logprobs and (entries or text) else None
        return CompletionChoice(index=0, text=text, logprobs=logprobs, finish_reason=finish)

    def _logprobs_of(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        texts = [self._model.text_of(entry.token_id) for entry in entries]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        top: list[dict[str, float]] = []
        for entry in entries:
            by_text: dict[str, float] = {}
            for token, logprob in entry.top:
                by_text.setdefault(self._model.text_of(token), logprob)  # the likeliest of one text
            top.append(by_text)
        logprobs = [entry.logprob for entry in entries]
        return CompletionLogprobs(
            tokens=texts, token_logprobs=logprobs, top_logprobs=top, text_offset=offsets
        )
