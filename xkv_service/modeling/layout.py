"""What a model caches for each token: the shape of its layers, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CACHE_NUMBER_BYTES = 2
"""Bytes of one number in the exact cache, as servers hold it: 16 bits, also where a CPU computes in float32,
so that no ratio is flattered by the dtype of the machine that made the artifact."""

LayerKind = Literal["full", "sliding"]


@dataclass(frozen=True)
class LayerLayout:
    """One attention layer's cache.

    Args:
        index: layer index in the model (`module.layer_idx`).
        kind: "full" attention is compressed; "sliding" layers keep their window exact.
        kv_heads, query_heads: heads. head_dim, value_dim: dimensions per head of keys and of values.
        window: tokens a sliding layer keeps, else None.
    """

    index: int
    kind: LayerKind
    kv_heads: int
    query_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.kv_heads * self.value_dim


@dataclass(frozen=True)
class ModelLayout:
    """Every attention layer's cache."""

    layers: tuple[LayerLayout, ...]

    @property
    def compressible(self) -> tuple[LayerLayout, ...]:
        """The full-attention layers, in order."""
        return tuple(layer for layer in self.layers if layer.kind == "full")

    @property
    def has_sliding(self) -> bool:
        """Whether some layer keeps a window only."""
        return any(layer.kind == "sliding" for layer in self.layers)

    def groups(self, size: int) -> tuple[tuple[LayerLayout, ...], ...]:
        """Adjacent compressible layers in groups of `size` (the last may be smaller)."""
        layers = self.compressible
        return tuple(layers[start : start + size] for start in range(0, len(layers), size))

    def bytes_full(self, tokens: int) -> int:
        """Bytes of the exact cache of `tokens` tokens."""
        total = 0
        for layer in self.layers:
            kept = tokens if layer.window is None else min(tokens, layer.window)
            total += kept * (layer.key_width + layer.value_width)
        return total * CACHE_NUMBER_BYTES
