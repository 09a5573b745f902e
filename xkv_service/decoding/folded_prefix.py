"""Tokens of a session's tail that became factors, behind the prefix that the session shares with others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix, Turns
from xkv_service.decoding.scoring import JoinedSketches, Scorer, SketchScorer
from xkv_service.selection.sketch import KeySketch


@dataclass(frozen=True)
class FoldedRows:
    """Some tokens' rows of a factorization X ≈ diag-scaled integers · [bases of the prefix; extra bases].

    Args:
        integers: int8 [n, r + e], r the rank of the prefix and e the ranks added.
        scales: float32 [r + e], the size of one step of each column.
        extra_bases: bfloat16 [e, W], W features of the group's layers side by side.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    extra_bases: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of the bases they added."""
        return self.integers.nbytes + self.scales.nbytes + self.extra_bases.nbytes

    def rows(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Coordinates [k, r + e] of tokens `positions` int64 [k]."""
        return self.integers[positions].to(dtype) * self.scales.to(dtype)


@dataclass(frozen=True)
class FoldedPart:
    """One layer's share of folded tokens: rows of its group, and its own columns of the extra bases.

    Args:
        keys, values: the group's rows. columns_k, columns_v: the layer's columns of the extra bases.
        sketch: index of the folded tokens, or None when the prefix has none.
    """

    keys: FoldedRows
    values: FoldedRows
    columns_k: slice
    columns_v: slice
    sketch: KeySketch | None

    @property
    def tokens(self) -> int:
        """n, folded tokens."""
        return self.keys.integers.shape[0]


class FoldedPrefix:
    """A layer's shared prefix and behind it the session's folded tokens, as one `ReadablePrefix`.

    Args:
        base: the layer's prefix, shared. parts: folded tokens, in order. turns: cos and sin of all positions.
    """

    def __init__(self, base: LayerPrefix, parts: Sequence[FoldedPart], turns: Turns) -> None:
        self.base, self.parts, self._turns = base, tuple(parts), turns
        self.dtype, self.exact_positions = base.dtype, base.exact_positions
        self.exact_keys, self.exact_values = base.exact_keys, base.exact_values
        self.tokens = base.tokens + sum(part.tokens for part in parts)
        behind = torch.arange(base.tokens, self.tokens, device=base.positions.device)
        self.positions = torch.cat([base.positions, behind])
        heads, dim = base.value_bases.shape[0], base.value_bases.shape[2]
        extra = [part.values.extra_bases[:, part.columns_v] for part in parts]
        split = [one.reshape(len(one), heads, dim).transpose(0, 1).to(self.dtype) for one in extra]
        self.value_bases = torch.cat([base.value_bases, *split], 1)
        self.index = self._joined_index()

    def keys(self, positions: torch.Tensor) -> torch.Tensor:
        """Rebuilt and rotated keys [k, kv_heads, D] of positions int64 [k]."""
        base = self.base
        rows = torch.empty(len(positions), base.key_bases.shape[1], dtype=self.dtype, device=positions.device)
        shared = positions < base.tokens
        rows[shared] = base.key_rows(positions[shared])
        for part, start, mine in self._split(positions):
            extra = part.keys.extra_bases[:, part.columns_k].to(self.dtype)
            own = _over(base.key_scales, part.keys.rows(positions[mine] - start, self.dtype))
            rows[mine] = own @ torch.cat([base.key_bases, extra])
        heads = rows.reshape(len(rows), base.kv_heads, base.head_dim)
        return self._turns.rotate(heads, positions).to(self.dtype)

    def value_factors(self, positions: torch.Tensor) -> torch.Tensor:
        """Coordinates [k, r] over `value_bases`: the prefix's ranks, then those that each part added."""
        base, rank = self.base, self.base.value_bases.shape[1]
        out = torch.zeros(
            len(positions), self.value_bases.shape[1], dtype=self.dtype, device=positions.device
        )
        shared = positions < base.tokens
        out[shared, :rank] = base.value_factors(positions[shared])
        column = rank
        for part, start, mine in self._split(positions):
            rows, extra = part.values.rows(positions[mine] - start, self.dtype), len(part.values.extra_bases)
            rows = _over(base.value_scales, rows)
            out[mine, :rank] = rows[:, :rank]
            out[mine, column : column + extra] = rows[:, rank:]
            column += extra
        return out

    def _split(self, positions: torch.Tensor) -> Iterator[tuple[FoldedPart, int, torch.Tensor]]:
        """Each part, its first position, and which of `positions` (bool [k]) are in it."""
        start = self.base.tokens
        for part in self.parts:
            yield part, start, (positions >= start) & (positions < start + part.tokens)
            start += part.tokens

    def _joined_index(self) -> Scorer | None:
        sketches = [part.sketch for part in self.parts if part.sketch is not None]
        return (
            None
            if self.base.index is None
            else JoinedSketches([self.base.index, *map(SketchScorer, sketches)])
        )


def folded_bytes(prefixes: Iterable[object]) -> int:
    """Bytes of the folded tokens of these layers; rows that a group shares count once."""
    rows: dict[int, FoldedRows] = {}
    total = 0
    for prefix in prefixes:
        for part in prefix.parts if isinstance(prefix, FoldedPrefix) else ():
            rows |= {id(part.keys): part.keys, id(part.values): part.values}
            if part.sketch is not None:
                total += part.sketch.codes.nbytes + part.sketch.scales.nbytes
    return total + sum(one.nbytes for one in rows.values())


def _over(scales: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Coordinates [k, r + e] over bases as `LayerPrefix` holds them, without their scales [r]."""
    if scales is None:
        return rows
    return torch.cat([rows[:, : len(scales)] * scales, rows[:, len(scales) :]], 1)
