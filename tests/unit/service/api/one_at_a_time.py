"""A backend for tests of the API: the real model over real artifacts, one request after the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator

import torch
from transformers import DynamicCache

from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.store import ArtifactStore
from xkv_service import SelectionSpec, XKVCache
from xkv_service.engine.messages import (
    Delta,
    EngineState,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Miss,
    Started,
    TokenLogprob,
)
from xkv_service.modeling.models import LoadedModel
from xkv_service.sessions.context import Context
from xkv_service.sessions.sampling import Sampler
from xkv_service.sessions.text_stream import TextStream


class OneAtATime:
    """Answers requests in the order they come.

    Attributes:
        most_waiting: more are refused as an engine would. step_s: seconds that each step takes longer.
        steps: forwards so far.
    """

    def __init__(self, loaded: LoadedModel, store: ArtifactStore) -> None:
        self._loaded, self._store = loaded, store
        self._turn = threading.Lock()
        self.waiting, self.most_waiting = 0, 1000
        self.step_s = 0.0
        self.steps = 0
        self.running = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if self.waiting >= self.most_waiting:
            yield Failed("overloaded", "too many requests wait", retry_after_s=3)
            return
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        left = threading.Event()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self.waiting += 1
        threading.Thread(target=self._run, args=(request, tell, left), daemon=True).start()
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            left.set()
            self.waiting -= 1

    async def states(self) -> list[EngineState]:
        return [EngineState(self.running, self.waiting - self.running, 0, 0, 0, (), {"steps": self.steps})]

    def _run(self, request: GenerationRequest, tell: Callable[[Event], None], left: threading.Event) -> None:
        submitted = time.perf_counter()
        with self._turn:
            self.running = 1
            try:
                for event in self._events(request, time.perf_counter() - submitted, left):
                    tell(event)
            except Exception as error:  # noqa: BLE001 - told to the client's side, which tests look at
                tell(Failed("internal", str(error)))
            finally:
                self.running = 0

    def _events(self, request: GenerationRequest, queued: float, left: threading.Event) -> Iterator[Event]:
        torch.set_num_threads(1)
        context, miss = self._context(request)
        held, artifact = len(context.ids), request.match and request.match.artifact_id
        sample, tokenizer = Sampler(request.settings), self._loaded.tokenizer
        text = TextStream(
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            (*request.settings.stop, *request.stops),
        )
        chosen: list[int] = []
        with context.enabled():
            logits = self._step(context, list(request.token_ids[held:]))
            yield Started(len(request.token_ids), held, held, 0, artifact if held else None, miss, queued)
            while len(chosen) < request.settings.max_new_tokens:
                if left.is_set():
                    yield Finished("cancelled", len(chosen), tuple(chosen))
                    return
                token = sample(logits)
                if token == tokenizer.eos_token_id:
                    yield Delta(text.flush(), 0)
                    yield Finished("stop", len(chosen), tuple(chosen))
                    return
                chosen.append(token)
                yield Delta(text.push(token), 1, _logprobs(logits, token, request.top_logprobs))
                if text.stopped:
                    yield Finished("stop", len(chosen), tuple(chosen))
                    return
                if len(chosen) < request.settings.max_new_tokens:
                    logits = self._step(context, [token])
            yield Delta(text.flush(), 0)
            yield Finished("length", len(chosen), tuple(chosen))

    def _step(self, context: Context, ids: list[int]) -> torch.Tensor:
        time.sleep(self.step_s)
        self.steps += 1
        return context.advance(ids)

    def _context(self, request: GenerationRequest) -> tuple[Context, Miss | None]:
        model, match = self._loaded.model, request.match
        if match is not None:
            try:
                cache = XKVCache.from_artifact(
                    model, self._store, match.artifact_id, SelectionSpec(), tokens=match.tokens
                )
                return Context(model, cache, request.token_ids[: match.tokens]), request.miss
            except CorruptArtifact as error:
                miss = Miss("corrupt", error.message)
            except ArtifactNotFound as error:
                miss = Miss("evicted", error.message)
            return Context(model, DynamicCache(config=model.config), []), miss
        return Context(model, DynamicCache(config=model.config), []), request.miss


def _logprobs(logits: torch.Tensor, token: int, count: int | None) -> tuple[TokenLogprob, ...]:
    if count is None:
        return ()
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(count) if count else None
    pairs = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return (TokenLogprob(token, float(logprobs[token]), pairs),)
