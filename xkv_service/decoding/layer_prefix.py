"""A layer's share of a compressed prefix, ready for attention."""

from __future__ import annotations

import copy
from typing import Protocol

import torch

from xkv_service.decoding.placing import sent
from xkv_service.decoding.scoring import LandmarkScorer, Scorer, SketchScorer
from xkv_service.factors import LowRank, PrefixFactors
from xkv_service.modeling.rotary import RotaryTable, rotate_planes
from xkv_service.packed_factors import PackedFactors
from xkv_service.selection.landmarks import Landmarks
from xkv_service.selection.sketch import KeySketch

_NONE = torch.empty(0, dtype=torch.int64)


class ReadablePrefix(Protocol):
    """What selection and attention read of one layer's prefix of p tokens, by KV head.

    Attributes:
        tokens: p. dtype: of matrix products.
        positions: int64 [n], ascending: the tokens that the factors alone describe.
        exact_positions: int64 [e], the others. exact_keys (rotated), exact_values: [e, kv_heads, D].
        value_bases: [kv_heads, r_v, Dv].
        index: scores tokens, or None.
    """

    tokens: int
    dtype: torch.dtype
    positions: torch.Tensor
    exact_positions: torch.Tensor
    exact_keys: torch.Tensor
    exact_values: torch.Tensor
    value_bases: torch.Tensor
    index: Scorer | None

    def keys(self, positions: torch.Tensor) -> torch.Tensor:
        """Rebuilt and rotated keys [k, kv_heads, D] of positions int64 [k]."""

    def value_factors(self, positions: torch.Tensor) -> torch.Tensor:
        """Token factors of values, [k, r_v]: the values are these times `value_bases`."""


class Turns:
    """cos and sin of every position of a prefix, made once for all layers that turn alike.

    Args:
        table: the rotary table. tokens: positions 0 .. tokens - 1. device: where the layers are.

    Attributes:
        cos, sin: [tokens, P], rounded as the model rounds them.
    """

    def __init__(self, table: RotaryTable, tokens: int, device: torch.device) -> None:
        self.table = table
        cos, sin = table.to(device).cos_sin(torch.arange(tokens, device=device))
        self.cos, self.sin = cos.to(table.rounding), sin.to(table.rounding)

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys before RoPE [k, kv_heads, D] of positions [k] -> float32, rotated."""
        return rotate_planes(keys, self.table.planes, self.cos[positions], self.sin[positions])


class LayerPrefix:
    """One full-attention layer of a prefix of p tokens, as `ReadablePrefix`: shared by every session.

    Args:
        factors: the prefix, all of it. layer: a compressed layer. turns: cos and sin of the layer's kind.
        device, dtype: where attention runs, and the dtype of its matrix products.
        positions: as `ReadablePrefix`, where they are known.

    Attributes:
        key_bases: [r_k, kv_heads D]. key_scales, value_scales: [r_k], [r_v], which the rows of `key_bases`
            and `value_bases` are still to be multiplied with, or None: bases of a calibration are shared by
            all its prefixes, scales are each prefix's own.
        index: the one that is stored, or None; a derived one is put here.
    """

    def __init__(
        self,
        factors: PrefixFactors,
        layer: int,
        turns: Turns,
        device: torch.device,
        dtype: torch.dtype,
        positions: torch.Tensor | None = None,
    ) -> None:
        group, place = factors.locate(layer)
        assert group.values is not None
        self.layer, self.tokens, self.dtype = layer, factors.tokens, dtype
        self.kv_heads = group.layout.kv_heads[place]
        self.turns = turns
        self._key_factors, self.key_bases, self.key_scales = half(group.keys, place, device, dtype)
        self._value_factors, value_bases, self.value_scales = half(group.values, place, device, dtype)
        value_bases = value_bases.view(len(value_bases), self.kv_heads, -1).transpose(0, 1)
        self.value_bases = value_bases.contiguous() if self.value_scales is None else value_bases
        self.head_dim = self.key_bases.shape[1] // self.kv_heads
        self._keep_exact(factors, device)
        self.positions = (
            described_positions(self.exact_positions, self.tokens) if positions is None else positions
        )
        self.index: Scorer | None = _scorer(factors, layer, device)

    def _keep_exact(self, factors: PrefixFactors, device: torch.device) -> None:
        where = torch.empty(0, dtype=torch.int64, device=device)
        keys = torch.empty(0, self.kv_heads, self.head_dim, dtype=self.dtype, device=device)
        values = torch.empty(0, self.kv_heads, self.value_bases.shape[2], dtype=self.dtype, device=device)
        if self.layer in factors.exact:
            exact = factors.exact[self.layer]
            where = exact.positions.to(device, torch.int64)
            keys = self.turns.rotate(exact.keys.to(device), where).to(self.dtype)
            values = exact.values.to(device, self.dtype)
        self.exact_positions, self.exact_keys, self.exact_values = where, keys, values

    def first(self, tokens: int) -> LayerPrefix:
        """The layer's share of the first tokens: views, so it costs no memory."""
        other = copy.copy(self)
        other._key_factors = first_rows(self._key_factors, tokens)
        other._value_factors = first_rows(self._value_factors, tokens)
        if self.index is not None:
            assert isinstance(self.index, SketchScorer | LandmarkScorer)
            other.index = self.index.first(tokens)
        keep_first(other, tokens)
        return other

    @property
    def token_factors(self) -> tuple[torch.Tensor | PackedFactors, torch.Tensor | PackedFactors]:
        """A_k [T, r_k] and A_v [T, r_v], shared by the layers of a group."""
        return self._key_factors, self._value_factors

    @property
    def nbytes(self) -> int:
        """Bytes this layer alone adds to its group's token factors."""
        kept = [self.exact_keys, self.exact_values, self.positions]
        for bases, scales in ((self.key_bases, self.key_scales), (self.value_bases, self.value_scales)):
            kept.append(bases if scales is None else scales)
        return sum(tensor.nbytes for tensor in kept)

    def keys(self, positions: torch.Tensor) -> torch.Tensor:
        """Rebuilt and rotated keys [k, kv_heads, D] of positions int64 [k]: RoPE(A_k[positions] B_k)."""
        rows = self.key_rows(positions).reshape(len(positions), self.kv_heads, self.head_dim)
        return self.turns.rotate(rows, positions).to(self.dtype)

    def key_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """Rebuilt keys before RoPE, heads side by side: [k, kv_heads D]."""
        return self._scaled(self._key_factors[positions], self.key_scales) @ self.key_bases

    def value_factors(self, positions: torch.Tensor) -> torch.Tensor:
        """A_v[positions], [k, r_v]: values are never rebuilt, (p A_v) B_v costs less (section 3.3)."""
        return self._scaled(self._value_factors[positions], self.value_scales)

    def _scaled(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        rows = rows.to(self.dtype)
        return rows if scales is None else rows * scales


class DescribedPositions:
    """`described_positions` of layers, held once for all that have the same exact tokens.

    They are made on the CPU, where the exact positions of a file are: a device would have to be waited for.

    Args:
        tokens: of the prefix. device: where the layers are.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens, self._device = tokens, device
        self._known: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of(self, factors: PrefixFactors, layer: int) -> torch.Tensor:
        """int64 [n], ascending, on the device."""
        exact = factors.exact[layer].positions.to("cpu", torch.int64) if layer in factors.exact else _NONE
        for mine, found in self._known:
            if torch.equal(mine, exact):
                return found
        found = sent(described_positions(exact, self._tokens), self._device)
        self._known.append((exact, found))
        return found


def described_positions(exact: torch.Tensor, tokens: int) -> torch.Tensor:
    """int64 [n], ascending: positions below `tokens` that are not among `exact`."""
    free = torch.ones(tokens, dtype=torch.bool, device=exact.device)
    free[exact] = False
    return free.nonzero()[:, 0]


def keep_first(prefix: ReadablePrefix, tokens: int) -> None:
    """Let a prefix that was copied keep only what it says of its first tokens, as views."""
    count = int((prefix.exact_positions < tokens).sum())
    prefix.exact_positions = prefix.exact_positions[:count]
    prefix.exact_keys, prefix.exact_values = prefix.exact_keys[:count], prefix.exact_values[:count]
    prefix.positions = prefix.positions[: tokens - count]
    prefix.tokens = tokens


def first_rows(factors: torch.Tensor | PackedFactors, tokens: int) -> torch.Tensor | PackedFactors:
    """Token factors of the first tokens: views."""
    return factors.first(tokens) if isinstance(factors, PackedFactors) else factors[:tokens]


def half(
    pair: LowRank, place: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor | PackedFactors, torch.Tensor, torch.Tensor | None]:
    """Token factors [T, r] as stored, a layer's bases [r, kv_heads D] in `dtype`, and [r] or None: what their
    rows are still to be multiplied with.
    """
    factors = pair.factors.to(device)
    if pair.shared is None or pair.scales is None:
        return factors, pair.layer_bases(place).to(device, dtype), None
    bases = pair.shared.placed(device, dtype)[: pair.rank, pair.columns(place)]
    return factors, bases, pair.scales.to(device, dtype)


def _scorer(factors: PrefixFactors, layer: int, device: torch.device) -> Scorer | None:
    if layer in factors.sketches:
        sketch = factors.sketches[layer]
        return SketchScorer(
            KeySketch(sketch.planes.to(device), sketch.codes.to(device), sketch.scales.to(device))
        )
    if layer in factors.landmarks:
        return LandmarkScorer(Landmarks(factors.landmarks[layer].to(device), factors.spec.landmark_chunk))
    return None
