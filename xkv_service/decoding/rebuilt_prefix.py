"""A prefix of which all keys and values are rebuilt and kept, for many sessions that attend to all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.prefix import Prefix

_CHUNK = 16384
"""Tokens that are rebuilt at once: 32 MiB of keys of 1,024 features in 16 bits."""


@dataclass(frozen=True)
class States:
    """One layer's keys and values of a document, those of a head one behind the other.

    Args:
        keys: [kv_heads, T, D], rotated. values: [kv_heads, T, Dv].
    """

    keys: torch.Tensor
    values: torch.Tensor


class RebuiltPrefix:
    """The keys and values of a prefix, layer by layer. It does not keep the prefix alive.

    Args:
        prefix: whole, of layers that kernels take.

    Attributes:
        layers: by layer index, those that are rebuilt.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.layers: dict[int, States] = {}
        self._all = len(prefix.compressed)

    @property
    def complete(self) -> bool:
        """Whether all layers are rebuilt."""
        return len(self.layers) == self._all

    def rebuild_next(self, prefix: Prefix) -> None:
        """Rebuild one layer more.

        Args:
            prefix: the one that it was made for.
        """
        index = prefix.compressed[len(self.layers)]
        layer = prefix.layers[index]
        assert isinstance(layer, LayerPrefix)
        self.layers[index] = rebuilt_states(layer)


def rebuilt_states(layer: LayerPrefix) -> States:
    """All keys, rotated, and values of one layer: exact tokens as they are, the others from their factors."""
    heads, dtype = layer.kv_heads, layer.dtype
    keys = layer.exact_keys.new_empty(heads, layer.tokens, layer.head_dim, dtype=dtype)
    values = layer.exact_values.new_empty(heads, layer.tokens, layer.value_bases.shape[2], dtype=dtype)
    for positions in torch.split(layer.positions, _CHUNK):
        keys[:, positions] = layer.keys(positions).transpose(0, 1)
        values[:, positions] = layer.value_factors(positions) @ layer.value_bases
    keys[:, layer.exact_positions] = layer.exact_keys.transpose(0, 1)
    values[:, layer.exact_positions] = layer.exact_values.transpose(0, 1)
    return States(keys, values)


def rebuilt_bytes(prefix: Prefix) -> int:
    """Bytes of all keys and values of a prefix of layers that kernels take."""
    total = 0
    for index in prefix.compressed:
        layer = prefix.layers[index]
        assert isinstance(layer, LayerPrefix)
        width = layer.kv_heads * (layer.head_dim + layer.value_bases.shape[2])
        total += prefix.tokens * width * layer.dtype.itemsize
    return total
