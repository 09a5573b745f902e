"""`Sequence`: one request on its way through the engine, from its prompt to its last token."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from xkv_artifacts.manifest import PartFidelity
from xkv_service.engine.head_start import HeadStart
from xkv_service.engine.messages import (
    Delta,
    Event,
    Failed,
    Finish,
    Finished,
    GenerationRequest,
    Miss,
    Started,
    TokenLogprob,
    waited_too_long,
)
from xkv_service.engine.parts import resident_key
from xkv_service.sessions.context import Context
from xkv_service.sessions.sampling import Sampler, check_chosen
from xkv_service.sessions.text_stream import TextStream

OnEvent = Callable[[Event], None]


class Sequence:
    """One request in the making.

    Args:
        request: what was asked. on_event: told what comes of it. text: turns tokens into text.
        most: tokens of the longest answer that fits the settings and the context window.
        ends: tokens that end an answer.

    Attributes:
        context: what is held of it, once it has begun. artifact_id: whose factors its prefix is, or None.
        part: which part of them, None: all.
        todo: ids to run next: the prompt's rest, then each token chosen.
        miss: why it is not, or not further, served from factors.
        head_start: while it waits for a prefix, the forward that has begun, or may begin.
        whole: whether its artifact could not be had, so that all of its prompt waits to be computed.
        computed: tokens of the context that were computed for this request before it joined the batch.
        done: whether it got its last event. failed: whether that was a failure.
        left: whether its place is free again.
        sampler: chooses its tokens.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_event: OnEvent,
        text: TextStream,
        *,
        most: int,
        ends: frozenset[int],
    ) -> None:
        self.request, self.miss = request, request.miss
        self.context: Context | None = None
        self.artifact_id: str | None = None
        self.part: PartFidelity | None = None
        self.todo: list[int] = []
        self.done = self.failed = False
        self.arrived = time.monotonic()
        self.load_began: float | None = None
        self.head_start: HeadStart | None = None
        self.whole = False
        self.computed = 0
        self.left = False
        self._tell, self._text, self._most, self._ends = on_event, text, most, ends
        self.sampler = Sampler(request.settings)
        self._cached = self._prefix_tokens = 0
        self._chosen: list[int] = []
        self._begun = self._loaded = 0.0
        self._unsent: list[TokenLogprob] = []
        self._unsent_tokens = 0

    @property
    def computing(self) -> bool:
        """Whether some of its prompt has been computed for it, or is being computed beside a load."""
        if self.context is not None:
            return len(self.context.ids) > self._cached
        return self.head_start is not None and self.head_start.begun

    def late(self, now: float) -> Failed | None:
        """What ends it, where it has taken or waited too long at `now`, on `time.monotonic`."""
        request, seconds = self.request, now - self.arrived
        if seconds > request.timeout_s:
            return Failed("timeout", f"the answer was not done after {request.timeout_s:g} s")
        if 0 < request.queue_timeout_s < seconds and not self.computing:
            return waited_too_long(request.queue_timeout_s)
        return None

    @property
    def decoding(self) -> bool:
        """Whether its prompt is done and it runs a token at a time."""
        return bool(self._chosen)

    @property
    def ids(self) -> list[int]:
        """Its prompt, and the tokens chosen since."""
        return [*self.request.token_ids, *self._chosen]

    @property
    def answered(self) -> int:
        """Tokens of its answer so far."""
        return len(self._chosen)

    @property
    def resident(self) -> str | None:
        """What the prefix that it goes on from is called in the pool, where it has one."""
        return None if self.artifact_id is None else resident_key(self.artifact_id, self.part)

    def begin(
        self, context: Context, artifact_id: str | None, computed: int = 0, part: PartFidelity | None = None
    ) -> None:
        """Go on from a context that holds the beginning of the prompt.

        Args:
            computed: tokens at its end that were computed for this very request; only with some may nothing
                be left to do.
            part: of the artifact, which the context's prefix is.
        """
        self.context, self.artifact_id, self.computed, self.part = context, artifact_id, computed, part
        self._cached = len(context.ids) - computed
        self._prefix_tokens = context.prefix_tokens if artifact_id is not None else 0
        self.miss = self._why(artifact_id)
        self.todo = list(self.request.token_ids[len(context.ids) :])
        self._begun = time.monotonic()
        if self.load_began is not None:
            self._loaded = self._begun - self.load_began

    def _why(self, artifact_id: str | None) -> Miss | None:
        """Why what it goes on from is no artifact, or not the one that could be, or was to be, used."""
        request, match = self.request, self.request.match
        if artifact_id is not None:  # a load or lookup that failed is no miss where another way served it
            served = match is None and request.prefix_id in (None, artifact_id)
            return None if served else request.miss
        if self.miss is None and match is not None and self._cached >= match.tokens:
            detail = f"an earlier turn holds {self._cached} tokens, computed without artifact "
            return Miss("kept_tail", f"{detail}{match.artifact_id[:12]}, which has {match.tokens} of them")
        return self.miss

    def accept(self, logits: torch.Tensor, token: int) -> None:
        """Take the token that `sampler` chose from float32 logits [vocabulary]; tell what is certain of it.

        Raises:
            ArithmeticError: the logits are not numbers.
        """
        if not self._chosen:
            self._tell(self._started())
        check_chosen(token)
        self._chosen.append(token)
        if token in self._ends:
            self._chosen.pop()
            self._finish("stop")
            return
        self._unsent_tokens += 1
        if self.request.top_logprobs is not None:
            self._unsent.append(_logprob(logits, token, self.request.top_logprobs))
        self._send(self._text.push(token))
        if self._text.stopped:
            self._finish("stop")
        elif len(self._chosen) >= self._most:
            self._finish("length")
        else:
            self.todo = [token]

    def cancel(self) -> None:
        """End it where it is."""
        if not self.done:
            self._end(Finished("cancelled", len(self._chosen), tuple(self._chosen)))

    def fail(self, failed: Failed) -> None:
        """End it without (the rest of) an answer."""
        if not self.done:
            self.failed = True
            self._end(failed)

    def _finish(self, finish: Finish) -> None:
        self._send(self._text.flush(), last=True)
        self._end(Finished(finish, len(self._chosen), tuple(self._chosen)))

    def _send(self, text: str, *, last: bool = False) -> None:
        if text or (last and self._unsent_tokens):
            self._tell(Delta(text, self._unsent_tokens, tuple(self._unsent)))
            self._unsent, self._unsent_tokens = [], 0

    def _end(self, event: Event) -> None:
        self.done, self.todo = True, []
        self._tell(event)

    def _started(self) -> Started:
        return Started(
            prompt_tokens=len(self.request.token_ids),
            cached_tokens=self._cached,
            prefix_tokens=self._prefix_tokens,
            tail_tokens=self._cached - self._prefix_tokens,
            artifact_id=self.artifact_id,
            miss=self.miss,
            part=None if self.part is None else self.part.share,
            queued_seconds=self._begun - self.arrived - self._loaded,
            load_seconds=self._loaded,
        )


def _logprob(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    found = logits.log_softmax(-1)
    best = found.topk(top) if top else None
    pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(found[token]), pairs)
