"""`Session`: a conversation over one prefix.

from xkv_service import Session, XKVCache
session = Session(model, tokenizer, XKVCache.from_factors(model, factors), document=text)
session.send("What is the CODE of the office?").text
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import Cache, PreTrainedModel

from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.fold import FOLD_ERROR, FOLD_KEEP
from xkv_service.errors import CacheMisuse, InvalidPrompt, InvalidSpec
from xkv_service.modeling.model_files import context_window
from xkv_service.modeling.tokens import end_tokens
from xkv_service.sessions.answer import Answer
from xkv_service.sessions.context import Context
from xkv_service.sessions.exact import exact_cache
from xkv_service.sessions.rendering import ChatRenderer, Messages, Template
from xkv_service.sessions.reply import Reply
from xkv_service.sessions.settings import GenerationSettings
from xkv_service.sessions.source import Source
from xkv_service.sessions.text_stream import TextStream

_log = logging.getLogger(__name__)


class Session:
    """A conversation that starts with a prefix, compressed or exact, and keeps its own tail.

    At every turn the whole conversation is rendered again. Where the tail does not go on as rendered, it is
    cut there, and the reply says how many tokens were dropped: an answer never depends on what was held.

    Args:
        model: in evaluation mode. tokenizer: its tokenizer.
        cache: holds the prefix and nothing else: an `XKVCache`, or a `DynamicCache` with `prefix_ids`.
        prefix_ids: the tokens in the cache; an `XKVCache` knows them.
        document: the text that the prefix was made from; it opens the first user message.
        system_prompt, template: those the prefix was made with.
        messages: a conversation to go on from, {"role", "content"} each.
        source: what the prefix was made from, needed to save the session.
        fold_after: fold the tail whenever an answer leaves more exact tokens than this; None: never.

    Attributes:
        messages: the conversation so far. It may be changed: the next turn computes what is new.
        last_reply: the last answer and what it took, or None.

    Raises:
        CacheMisuse: cache and prefix do not fit, or an exact cache is to be folded.
        UnsupportedModel: tails of this model or index cannot be folded.
        InvalidSpec: `fold_after` is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        cache: Cache,
        *,
        prefix_ids: Sequence[int] | None = None,
        document: str | None = None,
        system_prompt: str | None = None,
        template: Template = "chat",
        messages: Messages | None = None,
        source: Source | None = None,
        fold_after: int | None = None,
    ) -> None:
        self.renderer = ChatRenderer(tokenizer, document, system_prompt, template)
        self.context = Context(model, cache, _prefix_ids(cache, prefix_ids))
        self.messages: Messages = [dict(message) for message in messages or []]
        self.source = source
        self.last_reply: Reply | None = None
        self._answering = threading.Lock()
        self.fold_after = fold_after

    @property
    def fold_after(self) -> int | None:
        """Exact tokens of the tail past which it is folded but for its last `FOLD_KEEP`; None: never."""
        return self._fold_after

    @fold_after.setter
    def fold_after(self, tokens: int | None) -> None:
        if tokens is not None:
            if not isinstance(tokens, int) or tokens < FOLD_KEEP:
                raise InvalidSpec(
                    f"fold_after={tokens!r} is out of range",
                    hint=f"use an integer from {FOLD_KEEP}, the tokens that stay exact",
                )
            self.context.refuse_unfoldable()
        self._fold_after = tokens

    def send(self, text: str, settings: GenerationSettings | None = None) -> Reply:
        """Say something, and get the whole answer.

        Raises:
            InvalidPrompt: the conversation does not start with the prefix, or does not fit into the model's
                context window. Nothing was computed, and nothing is changed.
            CacheMisuse: another answer of this session is not done yet.
        """
        for _ in self.stream(text, settings):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def stream(self, text: str, settings: GenerationSettings | None = None) -> Iterator[str]:
        """Say something, and get the answer as it is made; `last_reply` has its figures afterwards.

        An answer that is broken off (the iterator is closed, or Ctrl-C) stays in the conversation as far as
        it came. One that fails does not, and neither does what was said.

        Raises:
            As `send`; at once, before the first piece is asked for.
        """
        settings = settings or GenerationSettings()
        asked = {"role": "user", "content": text}
        prompt = self.renderer.prompt_ids([*self.messages, asked])
        most = min(settings.max_new_tokens, self._room(prompt))
        return self._answered(list(self.messages), asked, prompt, replace(settings, max_new_tokens=most))

    def fork(self) -> Session:
        """The same conversation a second time; both go on by themselves. Costs nothing until they do.

        Raises:
            CacheMisuse: an answer is not done yet.
        """
        with self._turn():
            return self._with(self.context.fork())

    def exact(self) -> Session:
        """The same conversation on an exact cache, for comparison; the prefix is prefilled now."""
        ids, model = self.context.prefix_ids, self.context.model
        source = replace(self.source, artifact_id=None) if self.source else None
        return self._with(Context(model, exact_cache(model, ids), ids), source)

    def reset(self) -> None:
        """Forget the conversation; the prefix stays.

        Raises:
            CacheMisuse: an answer is not done yet.
        """
        with self._turn():
            self.messages, self.last_reply = [], None
            self.context.rewind(self.context.prefix_tokens)

    def fold(self, *, keep: int = 0, error: float = FOLD_ERROR) -> int:
        """Make all but the last `keep` tokens of the tail into factors, so that it does not grow back.

        Answers change by about `error` from then on, and a conversation that is changed before the folded
        end is computed again from the prefix.

        Returns:
            Tokens folded now.

        Raises:
            CacheMisuse, UnsupportedModel, InvalidSpec: as `XKVCache.fold`, or an answer is not done yet.
        """
        with self._turn():
            return self.context.fold(keep, error)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One answer at a time."""
        if not self._answering.acquire(blocking=False):
            raise CacheMisuse(
                "the session is in the middle of an answer",
                hint="read or close that stream first, or ask a fork of the session made before",
            )
        try:
            yield
        finally:
            self._answering.release()

    def _with(self, context: Context, source: Source | None = None) -> Session:
        other: Session = object.__new__(type(self))
        other.renderer, other.context, other.source = self.renderer, context, source or self.source
        other.messages = [dict(message) for message in self.messages]
        other.last_reply, other._answering = self.last_reply, threading.Lock()
        other._fold_after = self._fold_after if isinstance(context.cache, XKVCache) else None
        return other

    def _room(self, prompt: list[int]) -> int:
        """Tokens that an answer may have in the context window. Refuses prompts that cannot be answered."""
        context = self.context
        known = context.prefix_ids
        if prompt[: len(known)] != known:
            raise InvalidPrompt(
                "the conversation does not start with the tokens of the prefix",
                hint="use the document, system prompt and template that it was made with; in Python its "
                "tokens are ChatRenderer(tokenizer, document=text).prefix_ids()",
            )
        if len(prompt) == len(known):
            raise InvalidPrompt("nothing follows the prefix", hint="ask a question")
        window = context_window(context.model.config)
        if window is not None and len(prompt) >= window:
            raise InvalidPrompt(
                f"the conversation has {len(prompt):,} tokens, and the model's context window {window:,}",
                hint="start a new conversation, or use a shorter document",
            )
        return window - len(prompt) if window is not None else 2**62

    def _answered(
        self, before: Messages, asked: dict[str, str], prompt: list[int], settings: GenerationSettings
    ) -> Iterator[str]:
        with self._turn():
            if self.messages != before:
                raise CacheMisuse(
                    "the conversation went on after this stream was made",
                    hint="read a stream before the next",
                )
            answer = Answer(
                self.context,
                prompt,
                settings,
                ends=end_tokens(self.context.model, self.renderer.tokenizer),
                text=self._text_stream(settings),
            )
            try:
                yield from answer.pieces()
            except (GeneratorExit, KeyboardInterrupt):
                if answer.text.text:
                    self._keep(asked, answer)
                raise
            self._keep(asked, answer)

    def _keep(self, asked: dict[str, str], answer: Answer) -> None:
        self.last_reply = answer.reply()
        self.messages += [asked, {"role": "assistant", "content": self.last_reply.text}]
        if self._fold_after is not None and self.context.exact_tokens > self._fold_after:
            self.context.fold(FOLD_KEEP, FOLD_ERROR)
        if dropped := self.last_reply.dropped_tokens:
            _log.info(
                "the prompt departs from what is held: %d of its %d tokens were kept, %d dropped",
                self.last_reply.cached_tokens,
                self.last_reply.prompt_tokens,
                dropped,
            )

    def _text_stream(self, settings: GenerationSettings) -> TextStream:
        stops = (*settings.stop, *self.renderer.stops)
        return TextStream(self._decode, stops, strip=self.renderer.template == "raw")

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.renderer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _prefix_ids(cache: Cache, given: Sequence[int] | None) -> Sequence[int]:
    """The tokens of the prefix in a cache."""
    if not isinstance(cache, XKVCache):
        if given is None:
            raise CacheMisuse("an exact cache does not know its tokens", hint="give them as prefix_ids")
        return given
    known: list[int] = cache.prefix.token_ids.tolist()
    if given is not None and list(given) != known:
        raise CacheMisuse("prefix_ids are not the tokens of the cached prefix", hint="leave prefix_ids out")
    return known
