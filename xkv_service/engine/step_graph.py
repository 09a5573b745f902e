"""A decode step of many sequences as one CUDA graph. Importing it needs Triton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from xkv_service.decoding.attention_call import AttentionCall
from xkv_service.decoding.batch_tails import tail_row
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.kernel_choice import takes
from xkv_service.decoding.kernel_step import DecodeLaunch, Sizes, document_of, rebuilt_tokens, sizes_of
from xkv_service.decoding.rebuilt_prefix import RebuiltPrefix
from xkv_service.decoding.scoring import Scoring
from xkv_service.engine.compiled_step import CompiledStep
from xkv_service.engine.packed_cache import RowCache
from xkv_service.kernels.decode_attention import Shared
from xkv_service.kernels.document_table import DocumentLayer
from xkv_service.kernels.shared_attention import Document, Shape, SharedGroups
from xkv_service.kernels.tail_attention import append_token
from xkv_service.kernels.tail_table import TailRow, TailTable
from xkv_service.sessions.context import Context

_WARM = 2
"""Runs before a capture: the first compiles kernels and chooses products, which a capture cannot hold."""


class OtherScores(Exception):
    """Kernels do not make scores as the model does: it has a softcap, or sinks of their own.

    Args:
        scoring: the model's.
    """

    def __init__(self, scoring: Scoring) -> None:
        super().__init__(scoring)
        self.scoring = scoring


class Rider:
    """A sequence while graphs run for it: they write its new tokens into room behind its tail.

    Its cache does not know of these tokens before `settle`. Nobody else may use it until then.

    Args:
        context: over an `XKVCache` that kernels take. tokens: to be written next.

    Attributes:
        count: tokens of its tail, those written since included.
        rows: of tables of tails, by layer index. documents: of tables of documents, likewise.
        sizes: that it needs, as `sizes_of`.
        rebuilt: keys and values of its prefix, where it attends to all of them, and chooses nothing.

    Raises:
        ValueError: a tail of another dtype than the products: kernels could read no more than a copy of it.
    """

    def __init__(self, context: Context, tokens: int) -> None:
        self.context = context
        self.cache: XKVCache = context.cache
        self.count = self._held = self.cache.tail_tokens
        self._end = 0
        self.rows: dict[int, TailRow] = {}
        self.sizes = sizes_of([self.cache])
        self.rebuilt: RebuiltPrefix | None = None
        self.documents = self._documents()
        self._reserve(tokens)

    def budget(self, index: int) -> int:
        """Tokens that a layer chooses."""
        return 0 if self.rebuilt is not None else int(self.cache.layers[index].selection.budget)

    def attend_to(self, rebuilt: RebuiltPrefix | None) -> None:
        """From the next step on attend to all of the prefix, or to what is chosen (None): bind it anew."""
        self.rebuilt = rebuilt
        self.documents = self._documents()
        self.rows = {index: self._row(index) for index in self.rows}

    def make_room(self, tokens: int) -> bool:
        """Before a step: whether what it holds had to move, so that it would have room for as many more."""
        if self.count + tokens <= self._end:
            return False
        self.settle()
        self._reserve(tokens)
        return True

    def settle(self) -> None:
        """Show the cache what was written: it is an ordinary one again."""
        new = self.count - self._held
        if new:
            ids = self.context.ids[len(self.context.ids) - new :].tolist()
            self.cache.serve(torch.tensor([ids]))
        for index in self.rows:
            layer: Any = self.cache.layers[index]
            layer.extend(new)
            if new:
                layer.ran_by_kernels(0 if self.rebuilt is not None else rebuilt_tokens(layer.selection))
        self._held, self.rows = self.count, {}

    def _reserve(self, tokens: int) -> None:
        free = []
        for index in self.cache.prefix.compressed:
            layer: Any = self.cache.layers[index]
            layer.begin_tail()
            free.append(layer.reserve(tokens))
            self.rows[index] = self._row(index)
        self._end = self._held + min(free)

    def _row(self, index: int) -> TailRow:
        layer: Any = self.cache.layers[index]
        keys, values = layer.room
        return tail_row(layer, (keys[0], values[0]), alone=self.rebuilt is not None)

    def _documents(self) -> dict[int, DocumentLayer]:
        found = {index: document_of(self.cache, index) for index in self.cache.prefix.compressed}
        return found if self.rebuilt is None else {index: one.without_tokens for index, one in found.items()}


class StepGraph:
    """The forward of a model over up to `slots` new tokens of sequences, captured once.

    Every new token has a slot, in which its sequence rides: a sequence with several rides in as many, one
    behind the other. Its tokens are written before any of them attends, each to what is before it.

    On a CPU, where kernels are interpreted, it runs the same forward uncaptured.

    Args:
        model: inside `enable_xkv`. modules: attention modules by layer index.
        riders: of one layout, slot by slot, whose next step it runs first. slots: room for so many.
        shared: what is shared of rebuilt prefixes, as `shared_of`.
        sizes: of buffers, as `sizes_of`. stream, pool: where graphs are captured, and the memory that they
            share; None on a CPU. compiled: what stands in the place of the model's own code.

    Raises:
        OtherScores: from `run`, the first time.
    """

    def __init__(
        self, model: PreTrainedModel, modules: dict[int, nn.Module], riders: Sequence[Rider], slots: int,
        sizes: Sizes, shared: tuple[Shape, bool] | None, stream: torch.cuda.Stream | None, pool: Any,
        compiled: CompiledStep,
    ) -> None:  # fmt: skip
        self.slots, self._model, self._modules = slots, model, modules
        device, padded = model.device, _padded(riders, slots)
        self._launch = DecodeLaunch([one.cache for one in padded], sizes)
        self._tails = {
            index: TailTable([one.rows[index] for one in padded], device) for index in riders[0].rows
        }
        self._repeats = {index: bool(riders[0].cache.layers[index].selection.reuses) for index in self._tails}
        self._groups = None if shared is None else SharedGroups(shared[0], device)
        self._all_shared = shared is not None and shared[1]
        self._read = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self._riders: list[Rider] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None
        self._stream, self._pool, self._compiled = stream, pool, compiled

    def holds(self, rider: Rider) -> bool:
        """Whether the tables have its addresses."""
        return any(one is rider for one in self._riders)

    def carries(self, riders: Sequence[Rider]) -> bool:
        """Whether the tables are those of the riders, in this order."""
        return self._riders == list(riders)

    def bind(self, riders: Sequence[Rider]) -> None:
        """Run for these riders from now on, slot by slot: of the layout, within the sizes."""
        padded, none = _padded(riders, self.slots), self.slots - len(riders)
        for index, table in self._launch.tables.items():
            documents = [one.documents[index] for one in padded]
            budgets = [one.budget(index) for one in riders] + [0] * none
            lengths = [one.documents[index].tokens for one in riders] + [1] * none  # next to no work
            table.overwrite(documents, budgets, lengths)
            self._tails[index].overwrite([one.rows[index] for one in padded])
        if self._groups is not None:
            self._groups.overwrite(_sharing(riders))
        self._riders = list(riders)

    def release(self) -> None:
        """Keep no sequence and no document alive; bind it before it runs again."""
        self._riders = []
        for table in self._launch.tables.values():
            table.forget()
        if self._groups is not None:
            self._groups.forget()

    def run(self, ids: Sequence[int]) -> torch.Tensor:
        """A step of the riders that are bound, each slot with its next id; `Rider.count` stays.

        Returns:
            Logits, float32 [ids, vocabulary], that the next step overwrites.
        """
        none = [0] * (self.slots - len(ids))
        before = _slots_before(self._riders)
        positions = [len(one.context.ids) + new for one, new in zip(self._riders, before, strict=True)]
        counts = [one.count + new for one, new in zip(self._riders, before, strict=True)] + [-1] * len(none)
        self._read.copy_(torch.tensor([[*ids, *none], [*positions, *none], counts]), non_blocking=True)
        if self._model.device.type != "cuda":
            return self._forward()[: len(ids)]
        if self._graph is None:
            with torch.cuda.device_of(self._read):  # type: ignore[no-untyped-call]
                self._capture()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits[: len(ids)]

    def _capture(self) -> None:
        """Before it is captured a step runs some times: each writes the same tokens to the same places.

        Not by `torch.cuda.graph`: that waits for the device, empties caches that loads beside it use, and has
        one stream for all devices.
        """
        assert self._stream is not None
        graph, reader = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._stream.wait_stream(reader)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM):
                    self._forward()
                # Threads that load prefixes meanwhile may take memory: only this one's calls are captured.
                graph.capture_begin(self._pool, "thread_local")
                try:
                    logits = self._forward()
                except BaseException:
                    with suppress(RuntimeError):  # what failed is told, not what comes of its capture
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            reader.wait_stream(self._stream)  # where it fails, too: what it reads goes
        self._graph, self._logits = graph, logits

    def _forward(self) -> torch.Tensor:
        ids, positions, counts = self._read
        counts = counts.int()
        lengths = counts + 1
        layers = [
            _GraphLayer(
                index,
                self._launch,
                tails,
                counts,
                lengths,
                repeat=self._repeats[index],
                shared=None if self._groups is None else Shared(self._groups, index, self._all_shared),
            )
            for index, tails in self._tails.items()
        ]
        with self._compiled.in_place():
            out: Any = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),  # nobody reads it
                past_key_values=RowCache(layers, self._modules),
                use_cache=True,
            )
        logits: torch.Tensor = out.logits[0]
        return logits.float()


class _GraphLayer:
    """One layer of a step, as `RowLayer`: tokens are written and read by address."""

    def __init__(
        self, index: int, launch: DecodeLaunch, tails: TailTable, counts: torch.Tensor, lengths: torch.Tensor,
        *, repeat: bool, shared: Shared | None,
    ) -> None:  # fmt: skip
        self.index, self._launch, self._tails, self._repeat = index, launch, tails, repeat
        self._counts, self._lengths, self._shared = counts, lengths, shared

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As `RowLayer.append`."""
        append_token(keys[0].transpose(0, 1), values[0].transpose(0, 1), self._tails, self._counts)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """As `RowLayer.attend`."""
        if not takes(call.scoring):
            raise OtherScores(call.scoring)
        query = call.query[0].transpose(0, 1)
        return self._launch.run(
            self.index, query, self._tails, self._lengths, call.scoring.scaling, repeat=self._repeat,
            shared=self._shared,
        )[None]  # fmt: skip


def shared_of(
    riders: Sequence[Rider], heads: int, *, any_document: bool = False
) -> tuple[Shape, bool] | None:
    """The shape of groups that attend to all of a prefix, and whether all riders do; None: nobody does.

    Args:
        heads: of queries. any_document: as `Shape.of`.
    """
    sharing = [(document, len(places)) for document, places in _sharing(riders)]
    if not sharing:
        return None
    layers = [states for document, _ in sharing for states in document.layers.values()]
    least = min(len(states.keys) for states in layers)
    shape = Shape.of(sharing, -(-heads // least), any_document=any_document)
    return shape, sum(count for _, count in sharing) == len(riders)


def _slots_before(riders: Sequence[Rider]) -> list[int]:
    """Of each slot, how many before it have the same rider."""
    seen: Counter[int] = Counter()
    found = []
    for one in riders:
        found.append(seen[id(one)])
        seen[id(one)] += 1
    return found


def _sharing(riders: Sequence[Rider]) -> list[tuple[Document, list[int]]]:
    """What riders attend to of rebuilt prefixes, and their places; in an order that is not theirs."""
    found: dict[object, tuple[Document, list[int]]] = {}
    for place, rider in enumerate(riders):
        prefix, rebuilt = rider.cache.prefix, rider.rebuilt
        if rebuilt is not None:
            found.setdefault(prefix, (Document(rebuilt.number, rebuilt.layers, prefix.tokens), []))[1].append(
                place
            )
    return sorted(found.values(), key=lambda one: (one[0].number, one[0].tokens))


def _padded(riders: Sequence[Rider], slots: int) -> list[Rider]:
    """Slots without a rider have the addresses of the first: they must be of something that is there."""
    return [*riders, *[riders[0]] * (slots - len(riders))]
