"""What the API answers, as OpenAI's clients know it, and a field `xkv` that says what served the prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from xkv_service.engine.messages import MissReason, Started

FinishReason = Literal["stop", "length"]


class MissAnswer(BaseModel):
    """Why the prompt was not served from a stored prefix, or not as far as one goes."""

    reason: MissReason
    detail: str


class ServedFrom(BaseModel):
    """Which stored prefix served the prompt.

    Args:
        artifact: its id, or null. prefix_tokens: of the prompt that came from it.
        part: the share of its columns that served, or null: all of them, where one did.
        cached_tokens: these, and those kept from an earlier turn.
    """

    artifact: str | None
    prefix_tokens: int
    cached_tokens: int
    part: float | None
    miss: MissAnswer | None

    @classmethod
    def of(cls, started: Started) -> ServedFrom:
        """As the engine tells it."""
        miss = started.miss
        return cls(
            artifact=started.artifact_id,
            prefix_tokens=started.prefix_tokens,
            cached_tokens=started.cached_tokens,
            part=started.part,
            miss=None if miss is None else MissAnswer(reason=miss.reason, detail=miss.detail),
        )


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those that were not computed now."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, started: Started, generated: int) -> Usage:
        """Of a prompt and the tokens of its answer."""
        return cls(
            prompt_tokens=started.prompt_tokens,
            completion_tokens=generated,
            total_tokens=started.prompt_tokens + generated,
            prompt_tokens_details=PromptDetails(cached_tokens=started.cached_tokens),
        )


class TopToken(BaseModel):
    """A token that could have stood in a place; `bytes` is null where it is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(TopToken):
    """A token of the answer and the likeliest ones in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer's tokens."""

    content: list[ChosenToken]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The answer of a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The only choice there is."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    xkv: ServedFrom


class DeltaMessage(BaseModel):
    """Some more of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The only choice there is."""

    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """One event of a streamed chat; the last one has `xkv`, and `usage` if that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    xkv: ServedFrom | None = None


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion's tokens, one list entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """The only choice there is."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer of /v1/completions, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    xkv: ServedFrom | None = None


class ModelObject(BaseModel):
    """A name that requests may give as `model`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_window: int | None = Field(description="Tokens of prompt and answer together.")


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]
