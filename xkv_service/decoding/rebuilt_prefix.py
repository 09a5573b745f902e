"""A prefix of which all keys and values are rebuilt and kept, for many sessions that attend to all of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch

from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.prefix import Prefix

_CHUNK = 16384
"""Tokens that are rebuilt at once: 32 MiB of keys of 1,024 features in 16 bits."""
_NUMBERS = count()


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
        prefix: whole, of layers that kernels take; memory for all of them is taken at once.

    Attributes:
        layers: by layer index. number: no other of this process has it.
        complete: whether all are rebuilt: others hold nothing yet.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.layers = {index: _room(_layer(prefix, index)) for index in prefix.compressed}
        self.number, self._left = next(_NUMBERS), list(self.layers)

    @property
    def complete(self) -> bool:
        """See above."""
        return not self._left

    def rebuild_next(self, prefix: Prefix) -> None:
        """Rebuild one layer more.

        Args:
            prefix: the one that it was made for.
        """
        _rebuild(_layer(prefix, self._left[0]), self.layers[self._left[0]])
        del self._left[0]


def _layer(prefix: Prefix, index: int) -> LayerPrefix:
    layer = prefix.layers[index]
    assert isinstance(layer, LayerPrefix)
    return layer


def _room(layer: LayerPrefix) -> States:
    size = layer.kv_heads, layer.tokens
    return States(
        layer.exact_keys.new_empty(*size, layer.head_dim, dtype=layer.dtype),
        layer.exact_values.new_empty(*size, layer.value_bases.shape[2], dtype=layer.dtype),
    )


def _rebuild(layer: LayerPrefix, states: States) -> None:
    """All keys, rotated, and values of one layer: exact tokens as they are, the others from their factors."""
    for positions in torch.split(layer.positions, _CHUNK):
        states.keys[:, positions] = layer.keys(positions).transpose(0, 1)
        states.values[:, positions] = layer.value_factors(positions) @ layer.value_bases
    states.keys[:, layer.exact_positions] = layer.exact_keys.transpose(0, 1)
    states.values[:, layer.exact_positions] = layer.exact_values.transpose(0, 1)


def rebuilt_bytes(prefix: Prefix) -> int:
    """Bytes of all keys and values of a prefix of layers that kernels take."""
    layers = [_layer(prefix, index) for index in prefix.compressed]
    widths = [one.kv_heads * (one.head_dim + one.value_bases.shape[2]) * one.dtype.itemsize for one in layers]
    return prefix.tokens * sum(widths)
