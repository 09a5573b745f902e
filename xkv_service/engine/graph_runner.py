"""`GraphRunner`: sequences that kernels take run by CUDA graphs, all others in one ordinary forward."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from transformers import PreTrainedModel

from xkv_service.decoding import kernel_choice
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.kernel_choice import MOST_TOKENS, turned_off, why_not
from xkv_service.decoding.kernel_step import Sizes, layout_of, sizes_of
from xkv_service.decoding.prefix import product_dtype
from xkv_service.decoding.scoring import Scoring
from xkv_service.engine.compiled_step import CompiledStep
from xkv_service.engine.rebuilt_prefixes import RebuiltPrefixes
from xkv_service.engine.runners import PackedRunner, Work
from xkv_service.engine.step_graph import OtherScores, Rider, StepGraph, shared_of
from xkv_service.kernels.cudnn_attention import cudnn_runs
from xkv_service.kernels.probe import no_memory
from xkv_service.kernels.shared_attention import Shape
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.sessions.context import Context

_log = logging.getLogger(__name__)
_KEPT = 8
"""Graphs that are kept: each has buffers of its own, and batches grow and shrink through a few sizes."""

_KEPT_QUESTIONS = 3
"""Graphs of questions that are kept besides: of 128 slots and 128k tokens each has 0.3 GB of buffers."""

_ASKED = 2
"""From which question of a size on a graph runs them: to capture one takes as long as a few questions."""

_EARN = 6
"""How many more it takes where the graph of a size had to leave."""

SETTLED = 128
"""Steps of the same documents after which a graph of theirs alone runs them: capturing it takes 0.4 s, and a
step gains 1 to 10 ms, less at 8k (a guess between)."""

_SIZES = 256
"""Sizes of questions, and of graphs of documents, that are counted at most."""

_NEVER = 1 << 62
_PAUSE = 256
"""Steps without graphs where there was no memory for one: they take longer than trying does."""


class _Layout:
    """Stands for what `layout_of` gives: hundreds of numbers, which a step would compare for each context."""


class GraphRunner:
    """Runs new tokens of contexts, as `Runner`. Not thread-safe.

    What graphs wrote for a context its cache does not show before `settle`: settle contexts that leave.

    Args:
        model: one that `can_pack` allows, inside `enable_xkv`, on a device where kernels run. Nobody else
            runs it until the runner is made.
        rebuilt_bytes: on the device, for prefixes whose keys and values are kept rebuilt.
    """

    def __init__(self, model: PreTrainedModel, rebuilt_bytes: int = 0) -> None:
        inspected = inspect_loaded(model)
        self._model, self._modules = model, {**inspected.modules, **inspected.windowed}
        self._packed = PackedRunner(model)
        self._compiled = CompiledStep(model, on=kernel_choice.COMPILES)
        self._rebuilt = RebuiltPrefixes(rebuilt_bytes)
        self._riders: dict[int, Rider] = {}
        self._layouts: WeakKeyDictionary[XKVCache, _Layout | None] = WeakKeyDictionary()
        self._known: WeakValueDictionary[tuple[object, ...], _Layout] = WeakValueDictionary()
        self._graphs: OrderedDict[tuple[object, ...], StepGraph] = OrderedDict()
        self._asked: Counter[tuple[object, ...]] = Counter()
        self._settled: Counter[tuple[object, ...]] = Counter()
        self._stream, self._pool = _new_stream(model.device), _new_pool(model.device)
        self._broken, self._pause = False, 0
        self._no_questions = 0  # steps without questions in graphs
        self._heads = int(model.config.get_text_config(decoder=True).num_attention_heads)
        # Found out now, while there is memory.
        self._cudnn = rebuilt_bytes > 0 and cudnn_runs(model.device)
        self._fixed = False  # whether cuDNN reads in the latest graph
        self._begins_tails = product_dtype(model) == model.dtype  # what kernels append is what they read
        self._scoring = Scoring(1.0)  # how the model makes scores, as far as is known: a graph finds it out

    @property
    def shared_bytes(self) -> int:
        """As `Runner.shared_bytes`."""
        return self._rebuilt.nbytes

    @property
    def fixed_documents(self) -> set[int]:
        """Numbers of the rebuilt documents that cuDNN reads in some graph."""
        return set[int]().union(*map(_fixed_in, self._graphs))

    @torch.no_grad()
    def run(self, work: Work) -> torch.Tensor:
        """As `Runner.run`."""
        logits: dict[int, torch.Tensor] = {}
        by_layout = self._by_layout(work)
        riding = [place for both in by_layout.values() for places in both for place in places]
        self._rebuilt.heed([work[place][0].cache.prefix for place in riding])
        for layout, (steps, questions) in by_layout.items():
            together, found = [*steps, *questions], None
            if questions:
                found = self._question(layout, [work[place] for place in together])
            if found is None:
                together = steps
                found = self._step(layout, [work[place] for place in steps]) if steps else torch.empty(0)
            if found is None:
                break
            logits |= dict(zip(together, found, strict=True))
        left = [place for place in range(len(work)) if place not in logits]
        for place in left:
            self.settle(work[place][0])
        for forward in self._forwards(work, left):
            found = self._ask([(work[place][0], ids) for place, ids in forward.items()])
            logits |= dict(zip(forward, found, strict=True))
        return torch.stack([logits[place] for place in range(len(work))])

    def settle(self, context: Context) -> None:
        """As `Runner.settle`."""
        rider = self._riders.pop(id(context), None)
        if rider is not None:
            self._release(rider)
            rider.settle()

    def _by_layout(self, work: Work) -> dict[_Layout, tuple[list[int], list[int]]]:
        """Places of sequences that graphs run for, by what those of one graph have in common: of those that
        decode, and of questions, as far as there is room.
        """
        found: dict[_Layout, tuple[list[int], list[int]]] = {}
        ride = not self._broken and not self._pause
        self._pause, self._no_questions = max(0, self._pause - 1), max(0, self._no_questions - 1)
        for place, (context, ids) in enumerate(work):
            context.rewind(len(context.ids))  # mends what a forward that failed has left of it
            layout = self._layout(context) if ride and len(ids) <= MOST_TOKENS else None
            if layout is None:
                continue
            has_tail = len(context.ids) > context.cache.prefix.tokens
            steps, questions = found.setdefault(layout, ([], []))
            if len(ids) == 1 and has_tail:
                steps.append(place)
            elif (has_tail or self._begins_tails) and not self._no_questions:
                questions.append(place)
        for layout, (steps, questions) in found.items():
            room = MOST_TOKENS - len(steps)
            fit = [end <= room for end in accumulate(len(work[place][1]) for place in questions)]
            questions[:] = [place for place, fits in zip(questions, fit, strict=True) if fits]
            if questions and not self._asked_again(layout, [work[one] for one in (*steps, *questions)]):
                questions.clear()
        return found

    def _asked_again(self, layout: _Layout, work: Work) -> bool:
        """Whether a graph shall run questions and what goes with them: not the first of their size."""
        riders = [self._riders.get(id(context)) for context, _ in work]
        sizes = [
            sizes_of([context.cache]) if rider is None else rider.sizes
            for rider, (context, _) in zip(riders, work, strict=True)
        ]
        size = (layout, _power(sum(len(ids) for _, ids in work)), *_powers(sizes))
        if len(self._asked) > _SIZES:
            self._asked.clear()
        self._asked[size] += 1
        return self._asked[size] >= _ASKED

    def _question(self, layout: _Layout, given: Work) -> torch.Tensor | None:
        """Logits of a step with questions, or None: there was none. Without them it may run yet."""
        try:
            return self._ride(layout, given)
        except Exception as error:  # noqa: BLE001 - whatever it was, ordinary forwards go on
            full = no_memory(error)
            if isinstance(error, OtherScores):
                self._note(error)
            else:
                _log.warning("questions run without graphs for a while", exc_info=None if full else error)
        self._drop()
        self._asked.clear()
        self._no_questions = _PAUSE if full else _NEVER
        if full:
            torch.cuda.empty_cache()
        return None

    def _layout(self, context: Context) -> _Layout | None:
        """None: kernels do not run for the context, or only for some layers of the model."""
        cache = context.cache
        if not isinstance(cache, XKVCache):
            return None
        if cache not in self._layouts:
            every = all(isinstance(layer, PrefixLayer) for layer in cache.layers)
            taken = every and why_not(cache, self._scoring) is None
            self._layouts[cache] = self._known.setdefault(layout_of(cache), _Layout()) if taken else None
        return self._layouts[cache]

    def _forwards(self, work: Work, places: list[int]) -> list[dict[int, list[int]]]:
        """Ordinary forwards over the new tokens of these places: in each, ids by place.

        Questions share `MOST_TOKENS` of a forward, which its kernels take if they come first; all else is in
        the first one.
        """
        questions = [
            place for place in places if len(work[place][1]) > 1 and self._layout(work[place][0]) is not None
        ]
        tokens = [(place, token) for place in questions for token in work[place][1]]
        pieces = [tokens[start : start + MOST_TOKENS] for start in range(0, len(tokens), MOST_TOKENS)]
        forwards = [
            {place: [token for _, token in some] for place, some in groupby(piece, itemgetter(0))}
            for piece in pieces or [[]]
        ]
        forwards[0] |= {place: work[place][1] for place in places if place not in questions}
        return forwards if places else []

    def _ask(self, work: Work) -> torch.Tensor:
        """An ordinary forward; once more without kernels where one does not run, and without graphs and what
        is rebuilt where memory is full.
        """
        try:
            return self._packed.run(work)
        except Exception as error:
            full = no_memory(error) and bool(self._rebuilt.nbytes or self._graphs)
            if not full and not turned_off(error):
                raise
        if full:
            _log.warning("no memory for a forward: once more without graphs and what is rebuilt")
            self._drop()
            torch.cuda.empty_cache()
        else:
            self._packed, self._broken = PackedRunner(self._model), True
            self._layouts.clear()
        for context, _ in work:
            ids = list(context.ids)
            context.rewind(len(ids))
            if len(context.ids) < len(ids):  # a window could not go back
                context.advance(ids[len(context.ids) :])
        return self._packed.run(work)

    def _step(self, layout: _Layout, given: Work) -> torch.Tensor | None:
        """Logits of a step, or None: there was none, and no graphs run next time."""
        for again in (True, False):
            try:
                return self._ride(layout, given)
            except Exception as error:  # noqa: BLE001 - whatever it was, ordinary forwards go on
                outcome = self._note(error)
            self._drop()  # here nothing holds what failed any more
            if outcome == "over":
                return None
            if outcome == "without rebuilt":
                continue
            torch.cuda.empty_cache()
            if again:
                _log.warning("no memory for a decode step as a CUDA graph: once more without other graphs")
        _log.warning("no memory for a decode step as a CUDA graph: the next %d run without", _PAUSE)
        self._pause = _PAUSE
        return None

    def _note(self, error: Exception) -> Literal["full", "without rebuilt", "over"]:
        """What comes of a failed step: memory was full, once more without what is rebuilt, or no graphs."""
        if no_memory(error):
            return "full"
        if isinstance(error, OtherScores):
            _log.info("steps run without graphs: kernels do not make scores as the model does")
            self._scoring = error.scoring
            self._layouts.clear()
        elif self._fixed:
            _log.error("a decode step with cuDNN failed; no prefix is read by it from now on", exc_info=error)
            self._cudnn = False
            return "without rebuilt"
        elif any(rider.rebuilt is not None for rider in self._riders.values()):
            _log.error("a decode step failed; no prefix is rebuilt from now on", exc_info=error)
            self._rebuilt.turn_off()
            return "without rebuilt"
        else:
            _log.error(
                "a decode step as a CUDA graph failed; steps run without graphs from now on", exc_info=error
            )
            self._broken = True
        return "over"

    def _ride(self, layout: _Layout, given: Work) -> torch.Tensor:
        riders = [self._rider(context, len(ids)) for context, ids in given]
        counts = [len(ids) for _, ids in given]
        for rider, count in zip(riders, counts, strict=True):
            if rider.make_room(count):
                self._release(rider)
        self._share(riders)
        slots = [rider for rider, count in zip(riders, counts, strict=True) for _ in range(count)]
        graph = self._graph(layout, slots, asked=max(counts) > 1)
        if not graph.carries(slots):
            graph.bind(slots)
        with ExitStack() as stack:
            for context, ids in given:
                stack.enter_context(context.extending(ids))
            logits = graph.run([token for _, ids in given for token in ids])
            last = [end - 1 for end in accumulate(counts)]
            logits = logits.clone() if len(last) == len(logits) else logits[last]
        for rider, count in zip(riders, counts, strict=True):
            rider.count += count
        return logits

    def _rider(self, context: Context, tokens: int) -> Rider:
        rider = self._riders.get(id(context))
        if rider is not None and rider.cache is not context.cache:
            self._release(self._riders.pop(id(context)))
            rider = None
        if rider is None:
            rider = self._riders[id(context)] = Rider(context, tokens)
        return rider

    def _share(self, riders: list[Rider]) -> None:
        """Let those attend to all of their prefix whose keys and values are rebuilt."""
        for rider in riders:
            rebuilt = self._rebuilt.of(rider.cache.prefix)
            if rebuilt is not rider.rebuilt:
                self._release(rider)
                rider.attend_to(rebuilt)

    def _release(self, rider: Rider) -> None:
        """No graph may run by the addresses that it had."""
        for graph in self._graphs.values():
            if graph.holds(rider):
                graph.release()

    def _graph(self, layout: _Layout, riders: list[Rider], *, asked: bool) -> StepGraph:
        sizes = _powers([one.sizes for one in riders])
        slots = _power(len(riders)) if asked else _slots(len(riders))
        shared = shared_of(riders, self._heads, any_document=asked or not self._cudnn)
        name = (layout, slots, *sizes, shared, asked)
        if shared is not None and not self._is_settled(name, shared[0]):
            shared = shared_of(riders, self._heads, any_document=True)
            name = (layout, slots, *sizes, shared, asked)
        self._fixed = bool(_fixed_in(name))
        graph = self._graphs.pop(name, None)
        if graph is None:
            self._make_place(asked)
            graph = StepGraph(
                self._model, self._modules, riders, slots, sizes, shared, self._stream, self._pool,
                self._compiled,
            )  # fmt: skip
        self._graphs[name] = graph
        return graph

    def _is_settled(self, name: tuple[object, ...], shape: Shape) -> bool:
        """Whether a graph of these very documents, if it is one, shall run them: not where they come and go.

        Questions never have one: they come about other documents all the time.
        """
        if not shape.fixed or name in self._graphs:
            return True
        if len(self._settled) > _SIZES:
            self._settled.clear()
        self._settled[name] += 1
        return self._settled[name] > SETTLED

    def _make_place(self, asked: bool) -> None:
        """Let the graphs go that have not been used for longest, and those of documents that are gone."""
        numbers = self._rebuilt.numbers
        for name in [one for one in self._graphs if not numbers.issuperset(_fixed_in(one))]:
            del self._graphs[name]
        alike = [one for one in self._graphs if one[-1] is asked]
        for gone in alike[: max(0, len(alike) + 1 - (_KEPT_QUESTIONS if asked else _KEPT))]:
            del self._graphs[gone]
            self._settled.pop(gone, None)
            if asked:
                self._asked[gone[:-2]] = _ASKED - _EARN

    def _drop(self) -> None:
        """All graphs and riders go."""
        self._graphs.clear()
        for rider in self._riders.values():
            rider.settle()
        self._riders.clear()
        self._rebuilt.clear()
        self._pool = _new_pool(self._model.device)  # one that no graph has any more cannot be taken again


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One that no other thread has, whose work would be captured: PyTorch deals out 32 of a priority over and
    over, and nobody else takes one of high priority.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _new_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _fixed_in(name: tuple[Any, ...]) -> set[int]:
    """Numbers of the documents that a graph of this name is of."""
    return {one.document for one in name[-2][0].fixed} if name[-2] else set()


def _slots(count: int) -> int:
    """Sequences that a graph has room for: 1, 2, 4, 8, 16, then multiples of 16.

    Slots without a sequence take part in products alone, which read the weights once for all.
    """
    return _power(count) if count <= 16 else -(-count // 16) * 16


def _powers(sizes: Sequence[Sizes]) -> Sizes:
    """What buffers for all of them are for, so that graphs are of few sizes."""
    return Sizes(*(_power(max(every)) for every in zip(*sizes, strict=True)))


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
