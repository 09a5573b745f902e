"""`Engine`: one model that continues many prompts at once.

Sequences join and leave the batch at every step. A thread of the engine owns the model; everybody else talks
to it through an inbox, and is told what happens by a callback.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress

import torch

from xkv_artifacts.keys import BLOCK_TOKENS
from xkv_artifacts.manifest import PartFidelity
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.engine.admission import refusal_of, room_for
from xkv_service.engine.entrance import DIED, STOPPING, Entrance
from xkv_service.engine.head_start import HeadStarts, Ran
from xkv_service.engine.inbox import Cancelled, Loaded, Message, Submitted, TailLoaded
from xkv_service.engine.kept_tails import KeptTail, KeptTails
from xkv_service.engine.load_failure import LoadFailure
from xkv_service.engine.loading_rates import LEAST_CHUNK
from xkv_service.engine.messages import EngineState, Failed, GenerationRequest, Miss, PrefixMatch
from xkv_service.engine.parts import resident_key
from xkv_service.engine.prefill_clock import PrefillClock
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.runners import PackedRunner, Runner, SeparateRunner, make_runner
from xkv_service.engine.running_memory import RunningMemory
from xkv_service.engine.sequence import OnEvent, Sequence
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.step_plan import Part, plan_step
from xkv_service.engine.stored_tails import StoredTails
from xkv_service.kernels.probe import no_memory
from xkv_service.lost_device import is_lost
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.models import LoadedModel
from xkv_service.modeling.tokens import end_tokens
from xkv_service.prefilling.chunking import cache_bytes
from xkv_service.sessions.context import Context
from xkv_service.sessions.exact import empty_context
from xkv_service.sessions.sampling import choose
from xkv_service.sessions.text_stream import TextStream

_log = logging.getLogger(__name__)
_SHARE_OF_TAILS = 0.25
"""Of the memory for conversations, that the exact cache of one may take which could do without. A guess."""
_IDLE_S = 0.5
NO_MEMORY = Failed("overloaded", "there is no memory for the request now", retry_after_s=5.0)


class Engine:
    """Runs requests on one model, by its own thread, until it is closed. A context manager.

    Args:
        loaded: the model; nobody else changes its attention meanwhile.
        settings: limits.
        prefixes: keeps factors resident; None: every prompt is computed. The engine does not close it.
        stored: keeps what leaves the memory for tails; None: it is lost. The engine does not close it.
        beside_bytes: that other processes will take on the model's device.
        on_death: called on the engine's thread where it ends by itself, before anybody is told: an error of
            its own, or a device that is lost.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: EngineSettings | None = None,
        prefixes: PrefixPool | None = None,
        stored: StoredTails | None = None,
        on_death: Callable[[], None] = lambda: None,
        *,
        beside_bytes: int = 0,
    ) -> None:
        self.loaded, self.settings = loaded, (settings or EngineSettings()).on(loaded.model.device)
        self._prefixes, self._stored, self._on_death = prefixes, stored, on_death
        self._prefill_clock = PrefillClock(loaded.model.device)
        self._ends = end_tokens(loaded.model, loaded.tokenizer)
        self._exact_bytes = (
            0 if prefixes is None else cache_bytes(loaded.model, inspect_loaded(loaded.model).layout)
        )
        others = beside_bytes + (0 if prefixes is None else prefixes.state().budget)
        self._memory = RunningMemory.of(loaded.model, self.settings, others)
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._waiting: deque[Sequence] = deque()
        self._loading: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._head_starts: HeadStarts | None = None
        self._runner: Runner = SeparateRunner()
        self._beat = time.monotonic()
        self._tails = KeptTails(
            self.settings.tail_bytes,
            loaded.identity.fingerprint,
            self._release,
            stored.offer if stored is not None else None,
        )
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._entrance, self._ended = Entrance(), False
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Callable[[], None]:
        """Continue a prompt.

        Args:
            on_event: told on the engine's thread what comes of it (`messages.Event`); it must be quick, and
                must not raise. It is always told an end: `Finished` or `Failed`.

        Returns:
            Call it to cancel: the request leaves the batch before the next step.
        """
        stops = (*request.settings.stop, *request.stops)
        sequence = Sequence(
            request,
            on_event,
            TextStream(self._decode, stops),
            most=min(request.settings.max_new_tokens, room_for(request, self.loaded)),
            ends=self._ends,
        )
        refusal = refusal_of(request, self.loaded) or self._entrance.enter(
            lambda: self._inbox.put(Submitted(sequence))
        )
        if refusal is not None:
            sequence.fail(refusal)
        return lambda: self._inbox.put(Cancelled(sequence))

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive()

    @property
    def stuck_s(self) -> float:
        """Seconds since it last looked for messages: a step takes them, or a device that hangs."""
        return time.monotonic() - self._beat

    def state(self) -> EngineState:
        """What it holds and does now."""
        pool = self._prefixes.state() if self._prefixes is not None else None
        counters = dict(self._counters)
        if pool is not None:
            counters |= {f"prefixes_{name}": value for name, value in pool.counters.items()}
        if self._stored is not None:
            counters |= {f"tails_{name}": value for name, value in self._stored.counters().items()}
        return EngineState(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._loading),
            kept_tails=len(self._tails),
            prefix_bytes=pool.nbytes if pool is not None else 0,
            tail_bytes=self._tails.nbytes,
            running_bytes=self._memory.nbytes,
            rebuilt_bytes=self._runner.shared_bytes,
            stored_tail_bytes=self._stored.total_bytes if self._stored is not None else 0,
            prefixes=pool.prefixes if pool is not None else (),
            counters=counters,
            rates=self._prefixes.rates.figures() if self._prefixes is not None else {},
        )

    def close(self) -> None:
        """Stop; requests that are not done fail."""
        self._inbox.put(None)
        self._thread.join()

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    # What follows runs on the engine's thread alone.

    def _live(self) -> None:
        refusal = STOPPING
        try:
            with torch.no_grad(), enable_xkv(self.loaded.model):
                runner = self._runner = make_runner(self.loaded.model, self.settings.rebuilt_bytes)
                if isinstance(runner, PackedRunner):  # by kernels a question is quicker than its load
                    self._head_starts = HeadStarts(self.loaded.model, self.settings.selection)
                while self._receive():
                    self._forget_gone()
                    self._admit()
                    self._step(runner)
                    self._end_late()  # what came during a long step has had one of its own by now
        except Exception:
            _log.exception("the engine died")
            refusal = DIED
            self._on_death()
            raise
        finally:
            self._ended = True
            self._entrance.close(refusal)
            self._abandon(refusal)

    def _receive(self) -> bool:
        """Take what came in; wait for it where there is nothing else to do. False: it is time to stop."""
        self._beat = time.monotonic()
        idle = not self._running and self._next() is None
        with suppress(queue.Empty):
            message = self._inbox.get(timeout=_IDLE_S) if idle else self._inbox.get_nowait()
            while True:
                if message is None:
                    return False
                self._heed(message)
                message = self._inbox.get_nowait()
        return True

    def _heed(self, message: Message) -> None:
        try:
            if isinstance(message, Submitted):
                self._waiting.append(message.sequence)
            elif isinstance(message, Cancelled):
                self._cancel(message.sequence)
            elif isinstance(message, TailLoaded):
                self._take_tail(message.sequence, message.tail)
            else:
                self._take_loaded(message)
        except Exception as error:  # noqa: BLE001 - one bad request must not end the others
            self._fail(message.sequence, error)

    def _cancel(self, sequence: Sequence) -> None:
        if not sequence.done:
            sequence.cancel()
            self._leave(sequence, "cancelled")

    def _end_late(self) -> None:
        now = time.monotonic()
        for sequence in [*self._waiting, *self._loading.values(), *self._running]:
            if (late := sequence.late(now)) is not None:
                sequence.fail(late)
                self._leave(sequence, late.kind)

    def _leave(self, sequence: Sequence, reason: str) -> None:
        """A sequence is done: whoever it waited for, its place is free, and what it holds is kept."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._loading.pop(id(sequence), None)
        if sequence.head_start is not None:
            sequence.head_start.stop()
            sequence.head_start = None
        if sequence in self._running:
            self._running.remove(sequence)
        sequence.left = True
        try:
            self._put_away(sequence)
        finally:
            self._counters[f"ended_{reason}"] += 1

    def _put_away(self, sequence: Sequence) -> None:
        context, sequence.context = sequence.context, None
        if context is None:
            return
        try:
            self._runner.settle(context)
        except Exception:  # noqa: BLE001 - its device may be gone; the others must hear of their end
            _log.exception("what a sequence held is lost")
            self._release(sequence.resident)
            return
        if sequence.failed or sequence.part is not None or sequence.artifact_id in self._gone():
            # Behind a part: the next turn goes on from the whole, of which the part was not all.
            self._release(sequence.resident)
        else:
            self._tails.keep(context, sequence.request.namespace, sequence.artifact_id)

    def _gone(self) -> frozenset[str]:
        return self._prefixes.gone if self._prefixes is not None else frozenset()

    def _forget_gone(self) -> None:
        """No conversation goes on from a prefix that is gone from the store; what runs comes to its end."""
        for artifact_id in self._gone():
            self._tails.forget(artifact_id)

    def _admit(self) -> None:
        """Begin what waits, as far as there is room in the batch."""
        while (sequence := self._next()) is not None:
            self._waiting.remove(sequence)
            try:
                self._begin(sequence)
            except Exception as error:  # noqa: BLE001 - one bad request must not end the others
                self._fail(sequence, error)
        if self._loading and self._prefixes is not None:
            # Conversations between turns hold their prefixes; those who wait come first.
            while (pool := self._prefixes.state()).parked and self._tails.free_a_prefix(pool.staying):
                pass

    def _next(self) -> Sequence | None:
        begun = self._begun()
        return self._memory.next(self._waiting if len(begun) < self.settings.max_running else (), begun)

    def _begun(self) -> list[Sequence]:
        return [*self._running, *self._loading.values()]

    def _begin(self, sequence: Sequence) -> None:
        request, match = sequence.request, sequence.request.match

        def goes_on_from(kept: KeptTail, tokens: int) -> bool:
            exact, reach = kept.artifact_id is None, match.tokens if match is not None else 0
            if exact and request.goes_from_artifact(tokens, len(kept.context.ids)):
                return False
            return tokens >= reach and request.may_use(kept.artifact_id, kept.context.prefix_tokens)

        kept = self._tails.take(request.token_ids, request.namespace, goes_on_from)
        if kept is not None:
            if kept.artifact_id is not None and self._prefixes is not None:
                self._prefixes.hold(kept.artifact_id)
            self._start(sequence, kept.context, kept.artifact_id)
            return
        if match is None:
            self._start(sequence, empty_context(self.loaded.model), None)
            return
        if self._prefixes is None:
            self._start_without(sequence)
            return
        prefix = self._prefixes.take(match.artifact_id, match.tokens)
        if prefix is not None:
            self._start(sequence, self._context(prefix, match.artifact_id), match.artifact_id)
        elif sequence.whole:
            self._start_without(sequence)
        elif self._prefixes.decide(match.artifact_id, match.tokens, match.nbytes) == "load":
            self._load(sequence, match, self._prefixes)
        else:
            self._begin_late(sequence, match, self._prefixes)

    def _begin_late(self, sequence: Sequence, match: PrefixMatch, prefixes: PrefixPool) -> None:
        """All of its artifact would come too late: go on from a part that is there, or that comes in time."""
        for offer in reversed(match.parts):
            prefix = prefixes.take(match.artifact_id, match.tokens, offer.measured)
            if prefix is not None:
                context = self._context(prefix, resident_key(match.artifact_id, offer.measured))
                self._start(sequence, context, match.artifact_id, part=offer.measured)
                return
        for offer in reversed(match.parts) if prefixes.idle else ():
            spoiled = resident_key(match.artifact_id, offer.measured) in prefixes.gone
            in_time = prefixes.rates.part_in_time(match.tokens, offer.nbytes, offer.whole_nbytes)
            if in_time and not spoiled:
                self._load(sequence, match, prefixes, offer.measured)
                return
        sequence.miss = Miss("slow_load", f"prefilling {match.tokens} tokens is faster than loading them")
        prefixes.prefetch(match.artifact_id)
        self._start_without(sequence)

    def _load(
        self,
        sequence: Sequence,
        match: PrefixMatch,
        prefixes: PrefixPool,
        part: PartFidelity | None = None,
    ) -> None:
        """Wait for a prefix; where nothing else runs, with a forward behind it that begins meanwhile."""

        def told(answer: Prefix | LoadFailure, ran: Ran | None = None) -> None:
            self._inbox.put(Loaded(sequence, answer, ran, part))

        sequence.load_began = time.monotonic()
        self._loading[id(sequence)] = sequence
        if self._head_starts is None or self._running or part is not None:
            prefixes.request(match.artifact_id, match.tokens, told, part=part)
        else:
            ids = sequence.request.token_ids[match.tokens :][: self.settings.prefill_tokens]
            sequence.head_start = self._head_starts.request(prefixes, match, ids, told)

    def _take_loaded(self, loaded: Loaded) -> None:
        sequence, answer, ran = loaded.sequence, loaded.answer, loaded.ran
        match = sequence.request.match
        assert match is not None
        key = resident_key(match.artifact_id, loaded.part)
        if self._loading.pop(id(sequence), None) is None:  # it was cancelled, or took too long
            if isinstance(answer, Prefix):
                self._release(key)
            return
        sequence.head_start = None
        if isinstance(answer, Prefix):
            context = self._context(answer, key) if ran is None else ran.context
            self._start(sequence, context, match.artifact_id, ran, loaded.part)
            return
        sequence.miss = Miss(answer.reason, answer.detail)
        self._start_without(sequence)

    def _start_without(self, sequence: Sequence) -> None:
        """Its artifact cannot be had: go on from another conversation that has none, or compute all of it.

        That takes more memory than it was expected to: where there is no more, it waits again.
        """
        sequence.whole = True
        before = [one for one in self._waiting if one.arrived < sequence.arrived]
        if self._memory.next([*before, sequence], self._begun()) is not sequence:
            sequence.load_began = None
            self._waiting.insert(len(before), sequence)
            return
        self._start(sequence, self._exact_context(sequence.request), None)

    def _exact_context(self, request: GenerationRequest) -> Context:
        """What another conversation without an artifact holds of a prompt, or nothing."""
        kept = self._tails.take(
            request.token_ids,
            request.namespace,
            lambda kept, _: kept.artifact_id is None and request.may_use(None, 0),
        )
        return empty_context(self.loaded.model) if kept is None else kept.context

    def _start(
        self,
        sequence: Sequence,
        context: Context,
        artifact_id: str | None,
        ran: Ran | None = None,
        part: PartFidelity | None = None,
    ) -> None:
        """Go on from what is held, or from a stored tail that holds more."""
        sequence.begin(context, artifact_id, ran.tokens if ran is not None else 0, part)
        request = sequence.request
        if ran is not None:
            self._count(head_starts=1, head_start_tokens=ran.tokens)
            if not sequence.todo:
                self._join(sequence)
                self._accept(sequence, ran.logits, sequence.sampler(ran.logits))
                return
        began = time.monotonic()

        def told(tail: KeptTail | None) -> None:
            if tail is not None:  # one that loads nothing waits for no load
                sequence.load_began = sequence.load_began or began
            self._inbox.put(TailLoaded(sequence, tail))

        if self._stored is None or not self._stored.request(request, context, told):
            self._join(sequence)
            return
        self._loading[id(sequence)] = sequence

    def _take_tail(self, sequence: Sequence, tail: KeptTail | None) -> None:
        if self._loading.pop(id(sequence), None) is None:  # it was cancelled, or took too long
            if tail is not None:
                self._tails.keep(tail.context, tail.namespace, tail.artifact_id)
            return
        if tail is not None:
            self._release(sequence.resident)
            sequence.begin(tail.context, tail.artifact_id)
        else:
            context, computed = _context_of(sequence), sequence.computed
            sequence.begin(context, sequence.artifact_id, computed, sequence.part)
        self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        """It runs from the next step on."""
        self._prefer_everything(sequence)
        self._running.append(sequence)
        held = len(_context_of(sequence).ids) - sequence.computed
        prompt = len(sequence.request.token_ids)
        self._count(prompt_tokens=prompt, cached_tokens=held)
        self._counters["from_artifact" if sequence.artifact_id is not None else "without_artifact"] += 1
        if sequence.part is not None:
            self._count(from_part=1)
        if sequence.miss is not None:
            self._counters[f"miss_{sequence.miss.reason}"] += 1

    def _prefer_everything(self, sequence: Sequence) -> None:
        """Compute all of a prompt that has so much behind its prefix that this is faster.

        Not where the prefix was asked for by name, and not of a conversation: what it holds behind its prefix
        would be lost. (Others share a few tokens more than the prefix, those of a template.) Nor where its
        exact cache would leave little room for those of other conversations.
        """
        context, request, pool = _context_of(sequence), sequence.request, self._prefixes
        held, tokens, prefix = len(context.ids), len(request.token_ids), context.prefix_tokens
        if pool is None or sequence.artifact_id is None or sequence.computed or request.prefix_id is not None:
            return
        fits = tokens * self._exact_bytes <= _SHARE_OF_TAILS * self.settings.tail_bytes
        fits = fits and self._memory.holds(tokens, self._begun())
        if held - prefix >= BLOCK_TOKENS or not fits:
            return
        if pool.rates.everything_is_faster(prefix, tokens, held):
            detail = f"all {tokens} tokens are computed faster than {tokens - held} behind a prefix of {held}"
            sequence.miss = Miss("slow_load", detail)
            resident = sequence.resident
            context = self._exact_context(request)
            sequence.begin(context, None)
            self._release(resident)

    def _context(self, prefix: Prefix, key: str) -> Context:
        """Of a prefix that is held, and held no longer where this fails."""
        try:
            cache = XKVCache(prefix, self.settings.selection)
            return Context(self.loaded.model, cache, prefix.token_ids.tolist())
        except Exception:
            self._release(key)
            raise

    def _step(self, runner: Runner) -> None:
        parts = plan_step(self._running, self.settings)
        if not parts:
            return
        pool = self._prefixes if len(parts) == 1 and parts[0].count >= LEAST_CHUNK else None
        beside_loads = pool is not None and pool.loading
        began = time.perf_counter()
        self._prefill_clock.begin()
        logits = self._run(runner, parts)
        seconds, tokens = time.perf_counter() - began, sum(part.count for part in parts)
        self._count(steps=1, step_seconds=seconds, step_tokens=tokens)
        if pool is not None and not parts[0].sequence.left:
            self._note_prefill(pool, parts[0], beside_loads=beside_loads)
        ready = []
        for part, row in zip(parts, logits, strict=True):
            if row is not None:
                del part.sequence.todo[: part.count]
                if not part.sequence.todo:
                    ready.append((part.sequence, row))
        self._choose(ready)

    def _choose(self, ready: list[tuple[Sequence, torch.Tensor]]) -> None:
        """The next token of sequences, each with the logits behind its last, all at once."""
        if not ready:
            return
        tokens: list[int] = []
        with suppress(Exception):  # then one after the other, each with an end of its own
            tokens = choose(
                [sequence.sampler for sequence, _ in ready], torch.stack([row for _, row in ready])
            )
        for number, (sequence, row) in enumerate(ready):
            try:
                self._accept(sequence, row, tokens[number] if tokens else sequence.sampler(row))
            except Exception as error:  # noqa: BLE001 - one bad sequence must not take the others along
                self._fail(sequence, error)

    def _run(self, runner: Runner, parts: list[Part]) -> list[torch.Tensor | None]:
        """Logits of each part; None of one that failed, alone, and was told so."""
        work = [(_context_of(part.sequence), part.ids) for part in parts]
        held = [len(context.ids) for context, _ in work]
        try:
            return list(runner.run(work))
        except Exception as error:  # noqa: BLE001 - one bad sequence must not take the others along
            if len(parts) == 1:
                self._fail(parts[0].sequence, error)
                return [None]
        return [self._run_again(runner, part, count) for part, count in zip(parts, held, strict=True)]

    def _run_again(self, runner: Runner, part: Part, held: int) -> torch.Tensor | None:
        """Alone, behind the `held` tokens that were there before: it may have run, or lost what it held."""
        context = _context_of(part.sequence)
        try:
            runner.settle(context)
            context.rewind(held)
            ids = [*part.sequence.ids[len(context.ids) : held], *part.ids]
            for start in range(0, len(ids), self.settings.prefill_tokens):
                logits = runner.run([(context, ids[start : start + self.settings.prefill_tokens])])
            return logits[0]
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(part.sequence, error)
            return None

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence; where it took the device with it, the engine: nobody else can be served either."""
        name = sequence.request.id
        _log.error("request %s failed", name, exc_info=error, extra={"request_id": name})
        if not self._ended and is_lost(self.loaded.model.device):
            if not sequence.left and sequence not in [
                *self._waiting,
                *self._loading.values(),
                *self._running,
            ]:
                self._waiting.append(sequence)  # it hears of the end as the others do
            raise RuntimeError("the device is lost") from error
        if not sequence.left:
            full = no_memory(error)
            sequence.fail(
                NO_MEMORY if full else Failed("internal", f"the model failed: {type(error).__name__}")
            )
            self._leave(sequence, "no_memory" if full else "failed")

    def _accept(self, sequence: Sequence, logits: torch.Tensor, token: int) -> None:
        sequence.accept(logits, token)
        self._counters["generated_tokens"] += 1
        if sequence.done:
            self._leave(sequence, "finished")

    def _note_prefill(self, pool: PrefixPool, part: Part, *, beside_loads: bool) -> None:
        """What computing takes, where one prompt ran alone."""
        beside_loads |= pool.loading
        try:
            seconds = self._prefill_clock.seconds(beside_loads=beside_loads)
        except RuntimeError:  # of the device: whoever reads the logits hears of it
            return
        context = _context_of(part.sequence)
        pool.rates.prefilled(len(context.ids) - part.count, part.count, seconds, context.prefix_tokens)

    def _count(self, **more: float) -> None:
        for name, value in more.items():
            self._counters[name] += value

    def _release(self, key: str | None) -> None:
        if key is not None and self._prefixes is not None:
            self._prefixes.release(key)

    def _abandon(self, refusal: Failed) -> None:
        """The end: nobody may wait for ever."""
        with suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if message is not None:
                    self._heed(message)
        for sequence in [*self._waiting, *self._loading.values(), *self._running]:
            sequence.fail(refusal)
            self._leave(sequence, "abandoned")
        if self._stored is not None:
            self._stored.wait_for_room()
        self._forget_gone()
        self._tails.clear()


def _context_of(sequence: Sequence) -> Context:
    assert sequence.context is not None
    return sequence.context
