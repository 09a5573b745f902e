"""What the engine is asked and what it answers: plain values that can cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xkv_artifacts.keys import BLOCK_TOKENS
from xkv_artifacts.manifest import PartFidelity
from xkv_artifacts.origin import Origin
from xkv_service.sessions.settings import GenerationSettings

MissReason = Literal[
    "no_artifact",  # nothing is stored that shares enough tokens with the prompt
    "diverges",  # the best artifact and the prompt part at a token: another template, system prompt or text
    "other_model",  # the prefix that was named, or one that begins like the prompt, is another model's
    "low_fidelity",  # there is one, less faithful than this server accepts
    "evicted",  # the prefix that was named, or one that was found, was deleted or has ended
    "corrupt",  # its blob is damaged, and in quarantine
    "missing",  # its blob is gone, and nobody deleted it
    "unavailable",  # the catalog or the store does not answer
    "slow_load",  # prefilling is faster than loading it would be, or than what stands behind it
    "no_room",  # the memory for prefixes is too small for it, or full of prefixes that are in use
    "kept_tail",  # an earlier turn, computed without an artifact, holds as much and more
]
Finish = Literal["stop", "length", "cancelled"]
FailureKind = Literal["invalid", "overloaded", "queue_timeout", "timeout", "internal"]


@dataclass(frozen=True)
class PartOffer:
    """A part of an artifact that may serve where all of it takes too long to load.

    Args:
        measured: as the artifact's manifest has it.
        nbytes: of its tensors. whole_nbytes: of all the artifact's.
    """

    measured: PartFidelity
    nbytes: int
    whole_nbytes: int


@dataclass(frozen=True)
class PrefixMatch:
    """A stored prefix of the prompt, as the catalog found it.

    Args:
        artifact_id: whose factors. tokens: how many of the prompt's first tokens it holds.
        origin: of the artifact, where the prompt holds all of it, so that it can be made again.
        parts: of the artifact, those that may serve too, smallest first.
    """

    artifact_id: str
    tokens: int
    origin: Origin | None = field(default=None, compare=False, repr=False)
    parts: tuple[PartOffer, ...] = ()

    @property
    def nbytes(self) -> int | None:
        """Of all the artifact's tensors, where that is known."""
        return self.parts[0].whole_nbytes if self.parts else None


@dataclass(frozen=True)
class Miss:
    """Why a prompt is not, or not as far as it could be, served from factors; `detail` is one line."""

    reason: MissReason
    detail: str


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue.

    Args:
        id: names the request in logs and answers.
        token_ids: the whole prompt, at least one token.
        settings: how to decode.
        namespace: tails of earlier turns are looked for in this namespace alone.
        match: the stored prefix to use, or None. miss: why there is none, or none that goes further.
        prefix_id: the stored prefix that the client named, or None. Where it is the match, no other serves.
        top_logprobs: likeliest tokens to report beside each chosen one; None: no log probabilities.
        stops: texts that end the answer besides those of the settings (a template's own).
        timeout_s: from submission to the end of the answer.
        queue_timeout_s: from submission until some of its prompt is computed; 0: as long as `timeout_s`.
        streamed: each event is told to the client as it comes; else the answer may begin anew until its end.
    """

    id: str
    token_ids: tuple[int, ...]
    settings: GenerationSettings
    namespace: str = "default"
    match: PrefixMatch | None = None
    miss: Miss | None = None
    prefix_id: str | None = None
    top_logprobs: int | None = None
    stops: tuple[str, ...] = ()
    timeout_s: float = 600.0
    queue_timeout_s: float = 0.0
    streamed: bool = True

    def may_use(self, artifact_id: str | None, prefix_tokens: int) -> bool:
        """Whether a conversation in memory or in the store may serve it, of which so many tokens come from an
        artifact: not where the lookup found none, or none that holds as much, since that one is gone then,
        nor where the client named another.
        """
        if self.match is not None and self.match.artifact_id == self.prefix_id:
            return artifact_id == self.prefix_id
        if artifact_id is None:
            return True
        if self.match is not None:
            return artifact_id == self.match.artifact_id or prefix_tokens <= self.match.tokens
        return self.miss is None or self.miss.reason == "unavailable"

    def goes_from_artifact(self, tokens: int, of: int) -> bool:
        """Whether its artifact serves it better than a conversation without one, of which it shares `tokens`
        of `of`: another about the same document, which holds less than a block more than the artifact.
        Whatever goes on from that holds the document once more, uncompressed.
        """
        return self.match is not None and tokens < of and tokens - self.match.tokens < BLOCK_TOKENS


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log probability, and the likeliest ones in its place as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The first token is there.

    Args:
        prompt_tokens: of the whole prompt. cached_tokens: how many of them were not computed now.
        prefix_tokens: how many of those came from an artifact's factors. tail_tokens: the others, kept from
            an earlier turn.
        artifact_id: which artifact, or None. miss: why not, or why not further.
        part: the share of its columns that serve, where it is not all.
        queued_seconds: until its prompt was begun. load_seconds: spent waiting for factors.
    """

    prompt_tokens: int
    cached_tokens: int
    prefix_tokens: int = 0
    tail_tokens: int = 0
    artifact_id: str | None = None
    miss: Miss | None = None
    part: float | None = None
    queued_seconds: float = 0.0
    load_seconds: float = 0.0


@dataclass(frozen=True)
class Delta:
    """Some more of the answer: text that is certain now (it may be empty) and the new tokens."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is whole.

    Args:
        finish: "stop" the model or a stop text ended it, "length" the settings or the context window did,
            "cancelled" the client did.
        generated_tokens: of the answer. token_ids: all of them.
    """

    finish: Finish
    generated_tokens: int
    token_ids: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Failed:
    """There is no (more) answer. `message` is one line for the client.

    Args:
        retry_after_s: when to try again, of "overloaded" and "queue_timeout".
    """

    kind: FailureKind
    message: str
    hint: str | None = None
    retry_after_s: float | None = None


def waited_too_long(seconds: float) -> Failed:
    """The end of a request of which nothing has been computed after `seconds`."""
    return Failed(
        "queue_timeout",
        f"the server is busy: the request waited {seconds:g} s and was not begun",
        hint="send it again later",
    )


Event = Started | Delta | Finished | Failed
"""One request gets `Started`, any number of `Delta`, then `Finished`; or, at any point, `Failed`. One that is
not streamed may get another `Started` before its end: its answer begins anew."""


@dataclass(frozen=True)
class EngineState:
    """What an engine holds and does now, for /metrics and the status page.

    Args:
        running, waiting: requests. kept_tails: conversations between their turns.
        prefix_bytes, tail_bytes: resident. running_bytes: expected of requests that run, besides their
            prefixes. rebuilt_bytes: of prefixes whose keys and values are kept rebuilt.
        prefixes: artifact ids that are resident.
        stored_tail_bytes: of all tails in the store, as this engine heard last.
        rates: what prefilling and loading are believed to cost, as `LoadingRates.figures`; none where nothing
            is loaded.
        counters: by name, since the start: see `engine.counters`.
    """

    running: int
    waiting: int
    kept_tails: int
    prefix_bytes: int
    tail_bytes: int
    prefixes: tuple[str, ...]
    counters: dict[str, float] = field(default_factory=dict)
    stored_tail_bytes: int = 0
    running_bytes: int = 0
    rebuilt_bytes: int = 0
    rates: dict[str, float] = field(default_factory=dict)
