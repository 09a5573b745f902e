"""What a model caches for each token: the shape of its layers, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Literal

from xkv_artifacts.manifest import StateLayout, StateShape

CACHE_NUMBER_BYTES = 2
"""Bytes of one number in the exact cache, as servers hold it: 16 bits, also where a CPU computes in float32,
so that no ratio is flattered by the dtype of the machine that made the artifact."""

LayerKind = Literal["full", "latent", "sliding", "linear"]

_STATE_NUMBER_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class LayerLayout:
    """One attention layer's cache.

    Args:
        index: layer index in the model (`module.layer_idx`).
        kind: "full" attention is compressed; so is "latent" attention (MLA), which caches one latent and one
            rotated key for all heads; "sliding" layers keep their window exact, "linear" ones their state.
        kv_heads, query_heads: heads; 1 latent, 0 in a linear layer.
        head_dim, value_dim: dimensions per head of keys and of values. Latent attention has its latent in the
            place of the key, and its rotated key in that of the value; a linear layer has neither.
        window: tokens a sliding layer keeps, else None.
        state: what a linear layer keeps, else None.
    """

    index: int
    kind: LayerKind
    kv_heads: int
    query_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    state: StateLayout | None = None

    @property
    def key_width(self) -> int:
        """Numbers in one token's keys, all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Numbers in one token's values, all heads together."""
        return self.kv_heads * self.value_dim


@dataclass(frozen=True)
class ModelLayout:
    """Every attention layer's cache."""

    layers: tuple[LayerLayout, ...]

    @property
    def compressible(self) -> tuple[LayerLayout, ...]:
        """The full-attention and latent layers, in order."""
        return tuple(layer for layer in self.layers if layer.kind in ("full", "latent"))

    @property
    def exact(self) -> tuple[LayerLayout, ...]:
        """The layers that keep a window or a state of the prefix's end: a prefix with any is used whole."""
        return tuple(layer for layer in self.layers if layer.kind in ("sliding", "linear"))

    @property
    def has_sliding(self) -> bool:
        """Whether some layer keeps a window only."""
        return any(layer.kind == "sliding" for layer in self.layers)

    @property
    def states(self) -> tuple[StateLayout, ...]:
        """What the linear-attention layers keep."""
        return tuple(layer.state for layer in self.layers if layer.state is not None)

    def groups(self, size: int) -> tuple[tuple[LayerLayout, ...], ...]:
        """Adjacent compressible layers of one kind in groups of `size` (the last may be smaller)."""
        runs = [tuple(run) for _, run in groupby(self.compressible, key=lambda layer: layer.kind)]
        return tuple(run[start : start + size] for run in runs for start in range(0, len(run), size))

    def bytes_full(self, tokens: int) -> int:
        """Bytes of the exact cache of `tokens` tokens."""
        numbers = 0
        for layer in self.layers:
            kept = tokens if layer.window is None else min(tokens, layer.window)
            numbers += kept * (layer.key_width + layer.value_width)
        return numbers * CACHE_NUMBER_BYTES + sum(map(state_bytes, self.states))


def state_bytes(state: StateLayout) -> int:
    """Bytes of a linear layer's states, each in its own dtype: models compute them in the dtype they need."""
    return sum(map(_shape_bytes, (*state.conv, *state.recurrent)))


def _shape_bytes(tensor: StateShape) -> int:
    return prod(tensor.shape) * _STATE_NUMBER_BYTES[tensor.dtype]
