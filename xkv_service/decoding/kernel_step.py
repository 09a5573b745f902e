"""A decode step of single new tokens by the kernels, layer after layer. Importing it needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from xkv_service.decoding.batch_tails import BatchTails
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.kernel_choice import is_interleaved
from xkv_service.decoding.layer_prefix import LayerPrefix, Turns
from xkv_service.decoding.select import Selection
from xkv_service.errors import CacheMisuse
from xkv_service.kernels.decode_attention import DecodeAttention
from xkv_service.kernels.document_table import DocumentLayer, DocumentTable
from xkv_service.kernels.factor_rows import FactorRows

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache

_KEPT_BYTES = 2**30
"""Tails of a batch, all layers, that are kept from step to step; larger ones are laid out anew each time."""
_TOKENS = 2048
"""Buffers are for a multiple of so many tokens, so that kernels are compiled once."""
_DOCUMENTS: WeakKeyDictionary[LayerPrefix, dict[tuple[int, int], DocumentLayer]] = WeakKeyDictionary()


def layout_of(cache: XKVCache) -> tuple[object, ...]:
    """What caches of one launch have in common; of a cache that kernels take."""
    documents = _documents(cache)
    chosen = {index: cache.layers[index].selection for index in cache.prefix.compressed}
    return tuple(
        (index, documents[index].layout, one.reuses, _turning(one.prefix.turns))
        for index, one in chosen.items()
    )


class DecodeLaunch:
    """The kernels for a batch of sessions, all layers; tables and buffers are made once.

    Args:
        caches: of one layout (`layout_of`), which kernels take; every row of their tails is a session.
    """

    def __init__(self, caches: Sequence[XKVCache]) -> None:
        first = caches[0]
        documents = [_documents(cache) for cache in caches]
        rows = [len(cache.layers[first.prefix.compressed[0]].keys) for cache in caches]
        self._tables: dict[int, DocumentTable] = {}
        self._turns: dict[int, Turns] = {}
        self._most = self._capacity = 1
        for index in first.prefix.compressed:
            chosen = [cache.layers[index].selection for cache in caches]
            listed = [one[index] for one, count in zip(documents, rows, strict=True) for _ in range(count)]
            budgets = [one.budget for one, count in zip(chosen, rows, strict=True) for _ in range(count)]
            self._tables[index] = DocumentTable(listed, budgets)
            self._turns[index] = max((one.prefix.turns for one in chosen), key=lambda turns: len(turns.cos))
            self._most = max(self._most, *(_rebuilt(one) for one in chosen))
            self._capacity = max(self._capacity, *(one.prefix.tokens for one in chosen))
        self._shapes = {index: self._shape(index) for index in self._tables}
        self._tails: dict[int, BatchTails] = {}
        self._kernels: dict[tuple[object, ...], DecodeAttention] = {}
        self._ran: tuple[int, int] | None = None

    def attend(self, layers: Sequence[PrefixLayer], query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of every session's newest token, whose keys and values its layer has already.

        Args:
            layers: of one layer index, in the order of the caches. scaling: of products.
            query: [sessions, query_heads, D], rotated.

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
        tails, table = self._tails_of(index, layers), self._tables[index]
        query = query.contiguous()
        out = query.new_empty(*query.shape[:2], table.documents[0].value_bases.shape[2])
        kernels = self._kernels_of(index, query, scaling)
        kernels(query, tails.keys, tails.values, tails.lengths, table, out, repeat=selection.reuses)
        self._ran = (index, layers[0].tail_tokens)
        for layer in layers:
            layer.ran_by_kernels(_rebuilt(layer.selection))
        return out

    def _tails_of(self, index: int, layers: Sequence[PrefixLayer]) -> BatchTails:
        kept = self._tails.get(index)
        if kept is not None and kept.append(layers):
            return kept
        self._tails.pop(index, None)
        made = BatchTails(layers)
        if made.nbytes * len(self._tables) <= _KEPT_BYTES:
            self._tails[index] = made
        return made

    def _kernels_of(self, index: int, query: torch.Tensor, scaling: float) -> DecodeAttention:
        """Shared by the layers of one shape; what one chose is there for layers of every other shape."""
        name = (*self._shapes[index], scaling)
        if name not in self._kernels:
            alike = [self._tables[one] for one, shape in self._shapes.items() if shape == self._shapes[index]]
            widest = max(alike, key=lambda table: table.value_layout.rank)
            turns = self._turns[index]
            chosen = next((one.chosen for one in self._kernels.values()), None)
            self._kernels[name] = DecodeAttention(
                widest, query.shape[1], query.shape[2], widest.documents[0].value_bases.shape[2],
                _rounded(self._capacity, _TOKENS), _rounded(self._most, 64),
                (turns.cos.contiguous(), turns.sin.contiguous()), scaling,
                interleaved=bool(is_interleaved(turns)), chosen=chosen,
            )  # fmt: skip
        return self._kernels[name]

    def _shape(self, index: int) -> tuple[object, ...]:
        document = self._tables[index].documents[0]
        heads, _, value_dim = document.value_bases.shape
        return heads, value_dim, document.sketch.planes.shape, _turning(self._turns[index])


def _documents(cache: XKVCache) -> dict[int, DocumentLayer]:
    """By layer, shared by all sessions with the same prefix and the same tokens that are rebuilt always."""
    found: dict[int, DocumentLayer] = {}
    for index in cache.prefix.compressed:
        layer = cache.layers[index].selection.prefix
        known = _DOCUMENTS.setdefault(layer, {})
        name = (cache.selection.sink, cache.selection.recent)
        if name not in known:
            known[name] = _document(cache, index)
        found[index] = known[name]
    return found


def _document(cache: XKVCache, index: int) -> DocumentLayer:
    selection = leader = cache.layers[index].selection
    while leader.reuses:
        leader = cache.layers[cache.prefix.leaders[leader.prefix.layer]].selection
    rows = [FactorRows.of(factors) for factors in selection.prefix.token_factors]
    return DocumentLayer.of(selection.prefix, rows[0], rows[1], leader.always, leader.prefix.index)


def _rebuilt(selection: Selection) -> int:
    """Tokens that kernels rebuild for one session: they choose as many as the budget has."""
    return selection.budget + len(selection.always)


def _turning(turns: Turns) -> tuple[Any, ...]:
    """What angles depend on; recorded ones are each prefix's own."""
    table = turns.table
    if table.inv_freq is None:
        return (id(turns),)
    planes, frequencies = table.planes.cpu(), table.inv_freq.cpu()
    return tuple(planes.flatten().tolist()), tuple(frequencies.tolist()), table.scaling, table.rounding


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
