"""What clients may send to /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from xkv_service.api.errors import APIError, shortened
from xkv_service.sessions.settings import GenerationSettings

MOST_STOPS = 4
MOST_TOP_LOGPROBS = 20
MOST_COMPLETION_LOGPROBS = 5
_MOST_NAMES = 200
_LIKENESS = 0.65
"""Of two names, by difflib: "ttl_s" and "ttl" have 0.75, "pinned" and "pin" 0.67."""
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)

_IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "reasoning_effort"),
        *("verbosity", "moderation"),
    }
)
"""Change no answer here: labels, and requests about how a provider runs its own models."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
}
"""Parameters that are not supported, and the values that ask for nothing."""

_INSTEAD = {
    "n": "send a request for each answer",
    "best_of": "send a request for each answer",
    "response_format": "say in a message what the answer is to look like",
}


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"this is not Unicode text: {half} is half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""A text without lone surrogates, which JSON can write and no tokenizer reads."""


class Body(BaseModel):
    """What is sent. A parameter that is unknown is refused: left out, it would silently change the answer."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, sent: Any) -> Any:
        """Refuse at once what would take seconds to refuse name by name, while nobody else is served; and say
        of an unknown name which one may have been meant."""
        if not isinstance(sent, Mapping):
            return sent
        if len(sent) > _MOST_NAMES:
            raise ValueError(f"{len(sent):,} names are more than this object can have")
        for name in sent:
            if name not in cls.model_fields:
                meant = get_close_matches(name[:_MOST_NAMES], cls.model_fields, 1, _LIKENESS)
                # Pydantic tells Unicode alone.
                told = {"name": name.encode("utf-8", "backslashreplace").decode(), "meant": meant}
                raise PydanticCustomError("unknown_name", "unknown", told)
        return sent


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


def _joined(content: Any) -> Any:
    """A message's content as one text; it is checked up to the first fault, in words of the API."""
    if content is None:
        raise ValueError("a message needs content; calls of tools are not supported")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError('give a text, or a list of parts {"type": "text", "text": "..."}')
    return "".join(_text_of(at, part) for at, part in enumerate(content))


def _text_of(at: int, part: Any) -> str:
    given = part if isinstance(part, Mapping) else {}
    kind, text = given.get("type", "text"), given.get("text")
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"parts of type {shortened(kind)!r} are not supported: use text")
    if kind != "text" or not isinstance(text, str) or set(given) != {"type", "text"}:
        raise ValueError(f'part {at} is not of the form {{"type": "text", "text": "..."}}')
    return text


class Message(Body):
    """One message of a conversation; `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]

    @model_validator(mode="before")
    @classmethod
    def _without_labels(cls, message: Any) -> Any:
        """Leave out names, and what answers had that a client sends back."""
        if not isinstance(message, Mapping):
            return message
        if message.get("role") in ("tool", "function") or message.get("tool_calls"):
            raise ValueError("calls of tools are not supported: leave out such messages and their results")
        unused = ("name", "refusal", "annotations", "tool_calls", "function_call", "audio")
        return {name: value for name, value in message.items() if name not in unused}

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _list_of_stops(stop: Any) -> Any:
    if not isinstance(stop, str | list):
        raise ValueError(f"give a text, or a list of up to {MOST_STOPS}")
    return [stop] if isinstance(stop, str) else stop


Stops = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_list_of_stops, json_schema_input_type=str | list[str]),
]


def _id(name: str) -> str:
    if not _ID.fullmatch(name):
        raise ValueError("not the id of a prefix: 64 hexadecimal digits, as /v1/prefixes tells them")
    return name


class GenerationBody(Body):
    """What both endpoints take. A parameter that is null counts as left out."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Stops = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    prefix_id: Annotated[str, AfterValidator(_id)] | None = Field(
        None, description="A stored prefix that the prompt begins with; it is an error if it does not."
    )

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: Any) -> Any:
        """Leave out what asks for nothing, and refuse what this server cannot do."""
        if not isinstance(body, Mapping):
            return body
        given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
        for name, neutral in _NEUTRAL.items():
            if name in given and (value := given.pop(name)) not in neutral:
                raise _unsupported(name, value, neutral)
        return given

    @property
    def top_count(self) -> int | None:
        """Likeliest tokens to tell beside each one; None: no log probabilities."""
        raise NotImplementedError

    def settings(self, max_new_tokens: int) -> GenerationSettings:
        """How to decode."""
        seed = None if self.seed is None else self.seed % 2**63
        return GenerationSettings(
            max_new_tokens, float(self.temperature), float(self.top_p), tuple(self.stop), seed
        )


class ChatBody(GenerationBody):
    """A request to /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _needs_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return self

    @property
    def top_count(self) -> int | None:
        """As `GenerationBody.top_count`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _one_prompt(prompt: Any) -> Any:
    """The prompt of a list of one. Token ids are checked here, up to the first that is none."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError(
                f"{len(prompt):,} prompts in one request are not supported: send a request for each"
            )
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError("give a text, or a list of token ids")
    for at, token in enumerate(prompt):
        if type(token) is not int:
            raise ValueError(f"entry {at} of the token ids is not an integer")
    return prompt


Prompt = Annotated[
    Text | list[int],
    BeforeValidator(_one_prompt, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
]


class CompletionBody(GenerationBody):
    """A request to /v1/completions. A prompt is a text or token ids, or a list of one such."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_COMPLETION_LOGPROBS)] | None = None

    @property
    def top_count(self) -> int | None:
        """As `GenerationBody.top_count`."""
        return self.logprobs

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_tokens


def _unsupported(name: str, value: Any, neutral: Sequence[Any]) -> APIError:
    asked = f"{name}={json.dumps(value)}" if _is_short(value) else name
    others = " or ".join(json.dumps(one) for one in neutral if _is_short(one) and one not in (False, ""))
    leave = f"leave it out, or use {others}" if others else "leave it out"
    hint = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
    message = f"{asked} is not supported: {leave}{hint}"
    return APIError(400, message, param=name, code="unsupported_parameter")


def _is_short(value: Any) -> bool:
    """Whether it is a plain value, and short enough to be told."""
    return isinstance(value, str | int | float) and len(str(value)) <= 40
