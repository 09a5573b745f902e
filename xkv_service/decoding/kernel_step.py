"""A decode step of single new tokens by the kernels, layer after layer. Importing it needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from xkv_service.decoding.batch_tails import BatchTails
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.kernel_choice import is_interleaved
from xkv_service.decoding.layer_prefix import LayerPrefix, Turns
from xkv_service.decoding.select import Selection
from xkv_service.errors import CacheMisuse
from xkv_service.kernels.decode_attention import DecodeAttention, Shared
from xkv_service.kernels.document_table import DocumentLayer, DocumentTable
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.kernels.tail_table import TailTable

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache

_TOKENS = 2048
"""Buffers are for a multiple of so many tokens."""
_TURNINGS: WeakKeyDictionary[Turns, tuple[Any, ...]] = WeakKeyDictionary()
_DOCUMENTS: WeakKeyDictionary[LayerPrefix, dict[tuple[int, int, int], DocumentLayer]] = WeakKeyDictionary()


def layout_of(cache: XKVCache) -> tuple[object, ...]:
    """What caches of one launch have in common; of a cache that kernels take."""
    chosen = {index: cache.layers[index].selection for index in cache.prefix.compressed}
    return tuple(
        (index, document_of(cache, index).layout, one.reuses, _turning(one.prefix.turns))
        for index, one in chosen.items()
    )


class Sizes(NamedTuple):
    """Most tokens of a document, and of a session's list; most ranks of values."""

    tokens: int
    listed: int
    rank: int


class DecodeLaunch:
    """The kernels for a batch of sessions, all layers; tables and buffers are made once.

    Args:
        caches: of one layout (`layout_of`), which kernels take; every row of their tails is a session.
        sizes: what buffers are for, as `sizes_of`; by default that of `caches`.
        counts: new tokens of each cache, by default one; each is a session with a choice of its own.

    Attributes:
        tables: by layer index, each session's document.
    """

    def __init__(
        self, caches: Sequence[XKVCache], sizes: Sizes | None = None,
        counts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        first = caches[0]
        self._counts = counts or [1] * len(caches)
        rows = [len(cache.layers[first.prefix.compressed[0]].keys) for cache in caches]
        sessions = [row * count for row, count in zip(rows, self._counts, strict=True)]
        batch = [cache for cache, count in zip(caches, sessions, strict=True) for _ in range(count)]
        self._capacity, self._most, self._rank = sizes or sizes_of(caches)
        self.tables: dict[int, DocumentTable] = {}
        self._turns: dict[int, Turns] = {}
        for index in first.prefix.compressed:
            budgets = [cache.layers[index].selection.budget for cache in batch]
            self.tables[index] = DocumentTable([document_of(cache, index) for cache in batch], budgets)
            self._turns[index] = self._longest(
                [cache.layers[index].selection.prefix.turns for cache in caches]
            )
        self._shapes = {index: self._shape(index) for index in self.tables}
        self._tails: dict[int, BatchTails] = {}
        self._kernels: dict[tuple[object, ...], DecodeAttention] = {}
        self._ran: tuple[int, int] | None = None

    def attend(self, layers: Sequence[PrefixLayer], query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of every session's newest tokens, whose keys and values its layer has already.

        Args:
            layers: of one layer index, in the order of the caches. scaling: of products.
            query: [sessions, query_heads, D], rotated: those of a row one behind the other.

        Returns:
            [sessions, query_heads, Dv] in the dtype of `query`.

        Raises:
            CacheMisuse: the layer whose choice this one takes did not run before it in this step.
        """
        index, selection = layers[0].index, layers[0].selection
        if selection.reuses and self._ran != layers[0].leaders_state():
            raise CacheMisuse(
                f"layer {index} attends to what the layer before it chose, and that one did not run",
                hint="run the model's layers in order, all of them",
            )
        tails = self._tails_of(index, layers)
        out = self.run(index, query, tails.table, tails.lengths, scaling, repeat=selection.reuses)
        self._ran = (index, layers[0].tail_tokens)
        for layer in layers:
            layer.ran_by_kernels(rebuilt_tokens(layer.selection))
        return out

    def run(
        self, index: int, query: torch.Tensor, tails: TailTable, lengths: torch.Tensor, scaling: float, *,
        repeat: bool, shared: Shared | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The kernels of one layer: nothing waits for the device.

        Args:
            query: as `attend`. tails, lengths, shared: as `DecodeAttention`. repeat: attend to what was
                chosen last.

        Returns:
            As `attend`.
        """
        table, query = self.tables[index], query.contiguous()
        out = query.new_empty(*query.shape[:2], table.value_dim)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call] # Triton launches on the current one
            kernels = self._kernels_of(index, query, scaling)
            return kernels(query, tails, lengths, table, out, repeat=repeat, shared=shared)

    def _tails_of(self, index: int, layers: Sequence[PrefixLayer]) -> BatchTails:
        kept = self._tails.get(index)
        if kept is None or not kept.append(layers):
            kept = self._tails[index] = BatchTails(layers, self._counts)
        return kept

    def _kernels_of(self, index: int, query: torch.Tensor, scaling: float) -> DecodeAttention:
        """Shared by the layers of one shape; what one chose is there for layers of every other shape."""
        name = (*self._shapes[index], scaling)
        if name not in self._kernels:
            table, turns = self.tables[index], self._turns[index]
            chosen = next((one.chosen for one in self._kernels.values()), None)
            self._kernels[name] = DecodeAttention(
                table, query.shape[1], query.shape[2], table.value_dim, self._capacity, self._most,
                (turns.cos.contiguous(), turns.sin.contiguous()), scaling,
                interleaved=bool(is_interleaved(turns)), chosen=chosen, rank=self._rank,
            )  # fmt: skip
        return self._kernels[name]

    def _longest(self, turns: list[Turns]) -> Turns:
        """Of as many positions as there is room for; recorded angles are of one prefix, and have its own."""
        longest = max(turns, key=lambda one: len(one.cos))
        known = next((one for one in self._turns.values() if _turning(one) == _turning(longest)), None)
        if known is not None or longest.table.inv_freq is None or len(longest.cos) >= self._capacity:
            return known or longest
        return Turns(longest.table, self._capacity, longest.cos.device)

    def _shape(self, index: int) -> tuple[object, ...]:
        table = self.tables[index]
        shape = (table.kv_heads, table.value_dim, table.index_layout, table.dim)
        return (*shape, _turning(self._turns[index]))


def sizes_of(caches: Sequence[XKVCache]) -> Sizes:
    """What buffers of a launch are for, in multiples, so that kernels compile once."""
    layers = [(cache, index) for cache in caches for index in cache.prefix.compressed]
    chosen = [cache.layers[index].selection for cache, index in layers]
    tokens, most = max(one.prefix.tokens for one in chosen), max(map(rebuilt_tokens, chosen))
    rank = max(document_of(*one).value_rows.layout.rank for one in layers)
    return Sizes(_rounded(tokens, _TOKENS), _rounded(most, 64), _rounded(rank, 64))


def document_of(cache: XKVCache, index: int) -> DocumentLayer:
    """A layer of a cache's prefix, shared by all with this prefix and the same `sink` and `recent`.

    It has the index of the layer that chooses for it, which differs with the layers that reuse a choice.
    """
    prefix, leader = cache.layers[index].selection.prefix, _leader(cache, index)
    known = _DOCUMENTS.setdefault(prefix, {})
    name = (cache.selection.sink, cache.selection.recent, leader)
    if name not in known:
        keys, values = map(FactorRows.of, prefix.token_factors)
        chooses = cache.layers[leader].selection
        known[name] = DocumentLayer.of(prefix, keys, values, chooses.always, chooses.prefix.index)
    return known[name]


def _leader(cache: XKVCache, index: int) -> int:
    """The layer that chooses for a layer: itself where it reuses no choice."""
    while cache.layers[index].selection.reuses:
        index = cache.prefix.leaders[index]
    return index


def rebuilt_tokens(selection: Selection) -> int:
    """Tokens that kernels rebuild for one session: they choose as many as the budget has. By landmarks it may
    be fewer: chunks in which some tokens are exact or rebuilt always are paid for whole.
    """
    return selection.budget + len(selection.always)


def _turning(turns: Turns) -> tuple[Any, ...]:
    """What angles depend on; recorded ones are each prefix's own."""
    if turns not in _TURNINGS:
        _TURNINGS[turns] = _described(turns)
    return _TURNINGS[turns]


def _described(turns: Turns) -> tuple[Any, ...]:
    table = turns.table
    if table.inv_freq is None:
        return (id(turns),)
    planes, frequencies = table.planes.cpu(), table.inv_freq.cpu()
    return tuple(planes.flatten().tolist()), tuple(frequencies.tolist()), table.scaling, table.rounding


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
