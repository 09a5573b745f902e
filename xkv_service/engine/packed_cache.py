"""One forward over the new tokens of many sequences, laid one after the other in a single row.

Projections and MLPs do not care whose token is whose, so they run once over all. Attention does: each
sequence's new tokens meet that sequence's own cache. Single tokens of sequences that share a compressed
prefix go through attention together, and the tokens they choose are rebuilt once. Where kernels run, single
tokens of all sequences that they take go through them in one launch, whatever their prefixes, and so do the
tokens of a short question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import Cache

from xkv_service.decoding.attention_call import AttentionCall
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.kept_launches import KeptLaunches
from xkv_service.decoding.kernel_choice import MOST_TOKENS, takes
from xkv_service.decoding.xkv_attention import attend_next

if TYPE_CHECKING:
    from xkv_service.decoding.kernel_step import DecodeLaunch


@dataclass(frozen=True, eq=False)
class Segment:
    """The new tokens of one sequence.

    Args:
        cache: the sequence's own, of one row. held: tokens in it before. start, count: of its new tokens in
            the row.
    """

    cache: Cache
    held: int
    start: int
    count: int

    @property
    def columns(self) -> slice:
        """Its new tokens in the row."""
        return slice(self.start, self.start + self.count)


@dataclass(frozen=True, eq=False)
class _Step:
    """Sequences that one launch of the kernels attends for.

    Args:
        places: of the sequences. counts: of their new tokens.
        starts: int64 [their tokens], places in the row, on the device; None: they are all of the row.
    """

    places: list[int]
    counts: list[int]
    starts: torch.Tensor | None
    launch: DecodeLaunch


class RowLayer(Protocol):
    """A layer that attends for every token of a row as its own sequence has it.

    Attributes:
        index: layer index in the model.
    """

    index: int

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Give every sequence its new keys and values of a row [1, kv_heads, N, D]."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of every sequence's new tokens: [1, N, query_heads, Dv]."""


class RowCache(Cache):  # type: ignore[misc]
    """The caches of many sequences as one, for a forward over a row of their new tokens.

    Args:
        layers: of the model, in order. modules: attention modules by layer index.
    """

    def __init__(self, layers: Sequence[RowLayer], modules: dict[int, nn.Module]) -> None:
        self._modules = modules
        super().__init__(layers=list(layers))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to every sequence's layer its part of the row [1, kv_heads, N, D]; returns it unchanged."""
        layer = self.layers[layer_idx]
        attend_next(layer, self._modules[layer_idx])
        layer.append(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing stands before the row: every token brings its own position."""
        return 0


class PackedCache(RowCache):
    """Any sequences, each with a cache of its own.

    Args:
        segments: in the order of their tokens in the row. modules: as `RowCache`.
        launches: of the kernels, kept from forward to forward.
    """

    def __init__(
        self, segments: Sequence[Segment], modules: dict[int, nn.Module], launches: KeptLaunches
    ) -> None:
        self.segments = list(segments)
        steps = _Steps(self.segments, launches)
        count = len(segments[0].cache.layers)
        super().__init__([PackedLayer(index, self.segments, steps) for index in range(count)], modules)


class _Steps:
    """Which sequences of a forward kernels attend for: found out when the first layer attends."""

    def __init__(self, segments: list[Segment], kept: KeptLaunches) -> None:
        self._segments, self._kept = segments, kept
        self._found: list[_Step] | None = None

    def __call__(self, call: AttentionCall) -> list[_Step]:
        """For each launch, the places of its sequences."""
        if self._found is None:
            order, self._found = _few(self._segments), []
            caches = [self._segments[place].cache for place in order]
            counts = [self._segments[place].count for place in order]
            for taken, launch in self._kept.of(caches, call.scoring, counts):
                places = [order[number] for number in taken]
                starts = None
                if len(places) < len(self._segments):
                    taken_ones = [self._segments[one] for one in places]
                    where = torch.cat([torch.arange(one.start, one.columns.stop) for one in taken_ones])
                    starts = where.to(call.query.device, non_blocking=True)
                self._found.append(_Step(places, [counts[number] for number in taken], starts, launch))
        return self._found if takes(call.scoring) else []


def _few(segments: Sequence[Segment]) -> list[int]:
    """Places of compressed sequences with one token, or with several that are few enough for kernels."""
    found, left = [], MOST_TOKENS
    for place, one in enumerate(segments):
        more = one.count if one.count > 1 else 0
        if isinstance(one.cache, XKVCache) and more <= left:
            found.append(place)
            left -= more
    return found


class PackedLayer:
    """One layer of a `PackedCache`, as `RowLayer`.

    Args:
        index: layer index in the model. segments: the sequences. steps: those that kernels attend for.
    """

    def __init__(self, index: int, segments: list[Segment], steps: _Steps) -> None:
        self.index, self._segments, self._steps = index, segments, steps
        self._layers: list[Any] = [segment.cache.layers[index] for segment in segments]
        self._offsets: list[int] = []
        self._tails: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As `RowLayer.append`."""
        for segment in self._segments:
            if isinstance(segment.cache, XKVCache):
                segment.cache.follow(self.index)
        self._offsets = [layer.get_mask_sizes(0)[1] for layer in self._layers]
        self._tails = [
            layer.update(keys[:, :, segment.columns], values[:, :, segment.columns])
            for layer, segment in zip(self._layers, self._segments, strict=True)
        ]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """As `RowLayer.attend`."""
        parts: list[torch.Tensor | None] = [None] * len(self._segments)
        for step in self._steps(call) if any(isinstance(one, PrefixLayer) for one in self._layers) else ():
            query = call.query[0] if step.starts is None else call.query[0].index_select(1, step.starts)
            layers = [self._layers[place] for place in step.places]
            out = step.launch.attend(layers, query.transpose(0, 1), call.scoring.scaling)
            for place, part in zip(step.places, torch.split(out, step.counts), strict=True):
                parts[place] = part[None]
        for places in self._groups([place for place, part in enumerate(parts) if part is None]):
            together = self._attend_together(call, places) if len(places) > 1 else None
            for number, place in enumerate(places):
                parts[place] = (
                    self._attend_alone(call, place) if together is None else together[number : number + 1]
                )
        return torch.cat([part for part in parts if part is not None], 1)

    def _groups(self, places: list[int]) -> list[list[int]]:
        """Places of sequences that attend together: of single tokens behind one prefix, else one each."""
        groups: dict[Any, list[int]] = {}
        for place in places:
            layer, segment = self._layers[place], self._segments[place]
            shared = isinstance(layer, PrefixLayer) and segment.count == 1
            name = (id(layer.selection.prefix), layer.selection.spec) if shared else place
            groups.setdefault(name, []).append(place)
        return list(groups.values())

    def _attend_alone(self, call: AttentionCall, place: int) -> torch.Tensor:
        layer, segment = self._layers[place], self._segments[place]
        query = call.query[:, :, segment.columns]
        keys, values = self._tails[place]
        mask = _seen(segment, keys.shape[2], self._offsets[place], layer, query.device)
        if isinstance(layer, PrefixLayer):
            return layer.attend(replace(call, query=query, keys=keys, values=values, mask=mask))
        bias = None if mask is None else _bias(mask, query.dtype)
        result: torch.Tensor = call.plain(query, keys, values, bias)[0]
        return result

    def _attend_together(self, call: AttentionCall, places: list[int]) -> torch.Tensor:
        first: PrefixLayer = self._layers[places[0]]
        where = torch.tensor([self._segments[place].start for place in places], device=call.query.device)
        query = call.query[0].index_select(1, where).transpose(0, 1)[:, :, None]
        tails = [self._tails[place] for place in places]
        lengths = torch.tensor([keys.shape[2] for keys, _ in tails], device=query.device)
        mask = _rows_seen(first.prefix_tokens, lengths)
        keys, values = (_stacked(states) for states in zip(*tails, strict=True))
        out = first.attend(replace(call, query=query, keys=keys, values=values, mask=mask))
        for place in places:
            self._layers[place].rebuilt = first.rebuilt
        return out


def _seen(
    segment: Segment, columns: int, offset: int, layer: Any, device: torch.device
) -> torch.Tensor | None:
    """What a sequence's new tokens see: bool [1, 1, t, all], or None where one token sees everything."""
    window = layer.sliding_window if layer.is_sliding else None
    if isinstance(layer, PrefixLayer):
        columns += layer.prefix_tokens
    if segment.count == 1 and (window is None or columns <= window):
        return None
    queries = segment.held + torch.arange(segment.count, device=device)[:, None]
    keys = offset + torch.arange(columns, device=device)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return seen[None, None]


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers that are added to scores: every attention function takes those."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def _rows_seen(prefix: int, lengths: torch.Tensor) -> torch.Tensor:
    """bool [rows, 1, 1, prefix + longest]: row i sees the prefix and the first lengths[i] of its tail."""
    columns = torch.arange(int(lengths.max()) + prefix, device=lengths.device)
    return (columns < lengths[:, None] + prefix)[:, None, None]


def _stacked(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """[1, kv_heads, n_i, D] each -> [rows, kv_heads, longest, D], zeros behind the shorter ones."""
    longest = max(one.shape[2] for one in states)
    rows = states[0].new_zeros(len(states), states[0].shape[1], longest, states[0].shape[3])
    for row, one in zip(rows, states, strict=True):
        row[:, : one.shape[2]] = one[0]
    return rows
