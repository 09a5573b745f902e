"""Ask an engine, and say what a model answers without one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from talking import DOCUMENT, SELECTION, Talker
from transformers import DynamicCache, PreTrainedModel

from xkv_service import XKVCache, enable_xkv
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import Delta, Event, Failed, Finished, GenerationRequest, Started
from xkv_service.sessions.settings import GenerationSettings

SHORT = GenerationSettings(max_new_tokens=8)
STEP_S = 0.05
_NAMES = itertools.count()


class StillRates(LoadingRates):
    """Rates that a busy machine does not change."""

    def prefilled(self, start: int, tokens: int, seconds: float, prefix: int = 0) -> None:
        """Nothing is learned."""


class Asked:
    """One request to an engine, and what it was told."""

    def __init__(self, engine: Engine, ids: list[int], **fields: Any) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        request = GenerationRequest(str(next(_NAMES)), tuple(ids), fields.pop("settings", SHORT), **fields)
        self.request = request
        self.cancel = engine.submit(request, self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def wait(self, seconds: float = 60.0) -> Asked:
        assert self.ended.wait(seconds), self.events
        return self

    @property
    def started(self) -> Started:
        return next(event for event in self.events if isinstance(event, Started))

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def end(self) -> Finished | Failed:
        last = self.events[-1]
        assert isinstance(last, Finished | Failed)
        return last

    @property
    def tokens(self) -> list[int]:
        assert isinstance(self.end, Finished), self.end
        return list(self.end.token_ids)


def generated(talker: Talker, ids: list[int], *, prefix: bool = False, most: int = 8) -> list[int]:
    """What Transformers' own loop says behind `ids`, up to and without an end token."""
    with torch.no_grad(), enable_xkv(talker.model):
        cache: Any = DynamicCache(config=talker.model.config)
        if prefix:
            cache = XKVCache.from_factors(talker.model, talker.factors, SELECTION)
        options = {"past_key_values": cache, "do_sample": False, "max_new_tokens": most}
        out = talker.model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return out[: out.index(0)] if 0 in out else out


__all__ = ["SHORT", "Asked", "StillRates", "generated", "replace"]


def prompt_of(talker: Talker, question: str, *, document: bool = True) -> list[int]:
    """A chat's first prompt: a question behind the document, or alone."""
    content = f"{DOCUMENT}\n\n{question}" if document else question
    messages = [{"role": "user", "content": content}]
    return talker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@contextmanager
def paced(model: PreTrainedModel) -> Iterator[None]:
    """Each of its forwards takes `STEP_S` longer, until the block ends: what runs goes on running."""
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(STEP_S))
    try:
        yield
    finally:
        hook.remove()


def until(met: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait: an end is told before what was held is put away."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)
