"""Exact tokens and tails of a batch's sessions at one layer, as the decode kernels find them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.decoding.cache_layer import PrefixLayer
from xkv_service.kernels.tail_table import States, TailRow, TailTable, is_roomy


class BatchTails:
    """Where the sessions' layers keep their tails, and how long these are.

    Args:
        layers: of one layer index, each of some rows that have got the keys and values of new tokens.
        counts: new tokens of each row of each layer. Every one is a session, whose tail ends with it.

    Attributes:
        table: of exact tokens and tails. lengths: int32 [sessions], tokens of each tail.
    """

    def __init__(self, layers: Sequence[PrefixLayer], counts: Sequence[int]) -> None:
        tails = [
            (layer, tail, count)
            for layer, count in zip(layers, counts, strict=True)
            for tail in tail_states(layer)
        ]
        self._tails = [tail for _, tail, _ in tails]  # copies live as long as their addresses
        lengths = [
            layer.tail_tokens - count + token + 1
            for layer, count in zip(layers, counts, strict=True)
            for _ in layer.keys
            for token in range(count)
        ]
        with torch.inference_mode(False):  # a later step may not be in inference mode
            device = layers[0].keys.device
            rows = [(tail_row(layer, tail), count) for layer, tail, count in tails]
            self.table = TailTable([row for row, count in rows for _ in range(count)], device)
            self.lengths = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
        grows = set(counts) == {1} and all(map(_stays, layers))  # copies do not
        self._held = [layer.held() for layer in layers] if grows else []

    def append(self, layers: Sequence[PrefixLayer]) -> bool:
        """Take the newest token of every session.

        Returns:
            False: the tails are not those they were but for it, were moved or copied, or got several tokens.
        """
        held = [layer.held() for layer in layers]
        if not self._held or not all(
            now.follows(before) for now, before in zip(held, self._held, strict=True)
        ):
            return False
        self.lengths += 1
        self._held = held
        return True


def tail_states(layer: PrefixLayer) -> list[States]:
    """Keys [kv_heads, n, D] and values of each row's tail: where they are, or a copy for the kernels."""
    dtype, rows = layer.selection.prefix.dtype, zip(layer.keys, layer.values, strict=True)
    if _stays(layer):
        return list(rows)
    return [(_compact(keys, dtype), _compact(values, dtype)) for keys, values in rows]


def tail_row(layer: PrefixLayer, tail: States, *, alone: bool = False) -> TailRow:
    """A row over a tail, behind the tokens that the layer's prefix keeps exact, or `alone`."""
    exact = layer.selection.prefix.exact_keys, layer.selection.prefix.exact_values
    return TailRow((exact[0][:0], exact[1][:0]) if alone else exact, tail)


def _stays(layer: PrefixLayer) -> bool:
    """Whether kernels read a layer's tails where they are."""
    alike = layer.keys.dtype == layer.values.dtype == layer.selection.prefix.dtype
    return alike and all(is_roomy(row) for states in (layer.keys, layer.values) for row in states)


def _compact(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return states.to(dtype).clone(memory_format=torch.contiguous_format)
