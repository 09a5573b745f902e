"""Fold a session's tail into factors, so that a long conversation does not grow back to full size.

A group's layer bases describe its later tokens too, as far as they resemble the prefix: the tail's keys and
values are projected on them, and the rank is extended for what the projection leaves. The session owns the
folded tokens; the prefix that it shares with others does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.decoding.folded_prefix import FoldedPart, FoldedPrefix, FoldedRows
from xkv_service.decoding.layer_prefix import LayerPrefix, ReadablePrefix, Turns
from xkv_service.decoding.scoring import SketchScorer
from xkv_service.decoding.select import Selection
from xkv_service.errors import CacheMisuse, InvalidSpec, UnsupportedModel
from xkv_service.factorization.quantize import quantize_columns
from xkv_service.numeric import is_integer, is_number
from xkv_service.selection.sketch import KeySketch, encode
from xkv_service.selection.spec import SelectionSpec

if TYPE_CHECKING:
    from xkv_service.decoding.cache import XKVCache

FOLD_ERROR = 0.1
"""Relative error that folding aims at; measured in docs/defaults.md."""
FOLD_KEEP = 64
"""Last tokens of a tail that a session leaves exact when it folds by itself."""


def fold_tail(cache: XKVCache, *, keep: int = 0, error: float = FOLD_ERROR) -> int:
    """Fold the tail of a session of one row, all but its last `keep` tokens.

    Args:
        error: relative error of the keys and of the values of each group to reach; docs/defaults.md.

    Returns:
        Tokens folded.

    Raises:
        CacheMisuse: a batch of several rows, whose padding could not be told from tokens any more.
        UnsupportedModel: latent layers, or an index of landmarks.
        InvalidSpec: `keep` or `error` out of range.
    """
    if not (is_number(error) and 0 < error < 1):
        raise InvalidSpec(f"error={error!r} is out of range", hint="use a number between 0 and 1")
    if not is_integer(keep) or keep < 0:
        raise InvalidSpec(f"keep={keep!r} is out of range", hint="use an integer from 0")
    count = cache.tail_tokens - keep
    if count <= 0:
        return 0
    turns: dict[int, Turns] = {}
    for group in cache.prefix.groups:
        layers = [cache.layers[index] for index in group]
        _fold_group([_Open.of(layer, count) for layer in layers], cache.selection, error, turns)
    return count


def fold_rows(states: torch.Tensor, bases: torch.Tensor, error: float) -> FoldedRows:
    """Project states on the prefix's bases and extend the rank until little is left.

    Args:
        states: [n, W] keys before RoPE or values of a group's layers, side by side.
        bases: [r, W], the prefix's layer bases side by side.
        error: relative Frobenius error to reach, above 0; rounding to 8 bits comes on top.
    """
    wide, known = states.double(), bases.double()
    # Bases may depend on each other; on a GPU no driver of `lstsq` takes such.
    known_rows = wide @ known.T @ torch.linalg.pinv(known @ known.T, hermitian=True)
    residual = wide - known_rows @ known
    left, energy, right = torch.linalg.svd(residual, full_matrices=False)
    remaining = residual.square().sum() - energy.square().cumsum(0)
    allowed = (error * wide.norm()) ** 2
    extra = 0 if residual.square().sum() <= allowed else int((remaining > allowed).sum()) + 1
    rows = torch.cat([known_rows, left[:, :extra] * energy[:extra]], 1)
    integers, scales = quantize_columns(rows.float(), slice(None))
    return FoldedRows(integers, scales, right[:extra].to(torch.bfloat16))


def refuse_unfoldable(prefix: ReadablePrefix) -> None:
    """Refuse a layer whose tail cannot be folded.

    Raises:
        UnsupportedModel: latent attention, or an index of landmarks.
    """
    base = prefix.base if isinstance(prefix, FoldedPrefix) else prefix
    if not isinstance(base, LayerPrefix):
        raise UnsupportedModel("the tails of latent attention are not folded", hint="leave folding off")
    if base.index is not None and base.index.unit > 1:
        raise UnsupportedModel("a tail cannot join an index of landmarks", hint="compress with key sketches")


@dataclass(frozen=True, eq=False)
class _Open:
    """A cache layer about to be folded: its first `count` tail tokens."""

    layer: PrefixLayer
    base: LayerPrefix
    parts: tuple[FoldedPart, ...]
    count: int

    @classmethod
    def of(cls, layer: PrefixLayer, count: int) -> _Open:
        """Refuse what cannot be folded."""
        prefix = layer.selection.prefix
        refuse_unfoldable(prefix)
        base, parts = (prefix.base, prefix.parts) if isinstance(prefix, FoldedPrefix) else (prefix, ())
        assert isinstance(base, LayerPrefix)
        assert layer.keys is not None
        if layer.keys.shape[0] != 1:
            raise CacheMisuse(
                f"a batch of {layer.keys.shape[0]} rows cannot be folded", hint="fold sessions of one"
            )
        return cls(layer, base, parts, count)

    @property
    def start(self) -> int:
        """Position of the first token to fold."""
        return self.layer.prefix_tokens

    def rotated_keys(self) -> torch.Tensor:
        """[count, kv_heads, D]."""
        return self._head(self.layer.keys)

    def values(self) -> torch.Tensor:
        """[count, kv_heads, Dv]."""
        return self._head(self.layer.values)

    def _head(self, states: torch.Tensor | None) -> torch.Tensor:
        assert states is not None
        return states[0, :, : self.count].transpose(0, 1)

    def plain_keys(self) -> torch.Tensor:
        """Keys before RoPE [count, kv_heads D]."""
        positions = torch.arange(self.start, self.start + self.count, device=self.base.positions.device)
        return self.base.turns.table.unrotate(self.rotated_keys(), positions).flatten(1)

    def sketch(self) -> KeySketch | None:
        """The index of the tokens, over the planes of the prefix's."""
        index = self.base.index
        if not isinstance(index, SketchScorer):
            return None
        return KeySketch(index.planes, *encode(self.rotated_keys(), index.planes))

    def close(self, part: FoldedPart, turns: dict[int, Turns], spec: SelectionSpec) -> None:
        """Put the folded tokens behind the prefix and take them from the tail."""
        old = self.base.turns
        if id(old) not in turns:
            turns[id(old)] = Turns(old.table, self.start + self.count, self.base.positions.device)
        folded = FoldedPrefix(self.base, (*self.parts, part), turns[id(old)])
        self.layer.selection = Selection(folded, spec, reuses=self.layer.selection.reuses)
        self.layer.drop_first(self.count)


def _fold_group(open_layers: list[_Open], spec: SelectionSpec, error: float, turns: dict[int, Turns]) -> None:
    keys = torch.cat([one.plain_keys() for one in open_layers], 1)
    values = torch.cat([one.values().flatten(1) for one in open_layers], 1)
    bases_k = torch.cat([one.base.key_bases for one in open_layers], 1)
    bases_v = torch.cat([one.base.value_bases.transpose(0, 1).flatten(1) for one in open_layers], 1)
    first = open_layers[0].base
    # Folded rows are coordinates over the bases as a file describes them, scales included.
    bases_k = bases_k if first.key_scales is None else bases_k * first.key_scales[:, None]
    bases_v = bases_v if first.value_scales is None else bases_v * first.value_scales[:, None]
    rows_k, rows_v = fold_rows(keys, bases_k, error), fold_rows(values, bases_v, error)
    start_k = start_v = 0
    for one in open_layers:
        stop_k = start_k + one.base.key_bases.shape[1]
        stop_v = start_v + one.base.value_bases.transpose(0, 1).flatten(1).shape[1]
        part = FoldedPart(rows_k, rows_v, slice(start_k, stop_k), slice(start_v, stop_v), one.sketch())
        one.close(part, turns, spec)
        start_k, start_v = stop_k, stop_v
