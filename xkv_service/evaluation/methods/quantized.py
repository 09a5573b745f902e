"""Transformers' own quantized cache layers, filled with the exact prefix.

The integer layers need the extra `quantized` (hqq); 8-bit floating point needs nothing. Groups of numbers of
one token and head share a scale and a zero, as Transformers advises for hqq. Unlike Transformers' cache, the
tokens behind the prefix stay exact: there they are quantized too, 128 at a time, and cannot be cropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer

from xkv_service.errors import InvalidSpec, MissingExtra
from xkv_service.evaluation.methods.exact_layers import ExactLayers, filled_layer, number_bytes
from xkv_service.modeling.layout import LayerLayout
from xkv_service.prefilling.prefilled import Prefill

_BITS = (2, 4, 8)
# hqq packs up to four numbers of different groups into a byte: groups come in fours.
_PACKED_TOKENS = 4
_SCALE_BYTES = 4


@dataclass(frozen=True, eq=False)
class QuantizedStates:
    """One layer of a prefix.

    Args:
        layer: Transformers' layer, holds the first tokens; None when all are exact.
        keys, values: the exact last tokens [1, kv_heads, r, D].
    """

    layer: DynamicLayer | None
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of packed numbers, scales and zeros at 16 bits, and of the exact tokens."""
        exact = number_bytes((self.keys, self.values))
        if self.layer is None:
            return exact
        return exact + sum(
            _side_bytes(side) for side in (self.layer._quantized_keys, self.layer._quantized_values)
        )

    def rebuilt(self) -> DynamicLayer:
        """An ordinary layer of the dequantized tokens and the exact ones."""
        if self.layer is None:
            return filled_layer(self.keys, self.values)
        # Adding no tokens returns all that a layer holds, dequantized.
        nothing = self.keys[:, :, :0], self.values[:, :, :0]
        keys, values = self.layer.update(*nothing)
        return filled_layer(torch.cat((keys, self.keys), -2), torch.cat((values, self.values), -2))


def _side_bytes(side: tuple[torch.Tensor, object]) -> int:
    """Bytes of quantized keys or values with what is needed to read them."""
    packed, about = side
    if isinstance(about, dict):
        return packed.nbytes + number_bytes((about["scale"], about["zero"]))
    return packed.nbytes + _SCALE_BYTES


@dataclass(frozen=True, eq=False)
class QuantizedPrefix:
    """A prefix whose full-attention layers are quantized.

    Args:
        tokens: T.
        layers: by layer index.
        others: the layers that are left alone.
    """

    tokens: int
    layers: dict[int, QuantizedStates]
    others: ExactLayers

    @property
    def nbytes(self) -> int:
        """Bytes held, everything counted."""
        return sum(layer.nbytes for layer in self.layers.values()) + self.others.nbytes

    @torch.no_grad()
    def cache(self) -> DynamicCache:
        """An ordinary cache of the dequantized prefix."""
        return self.others.cache({index: layer.rebuilt() for index, layer in self.layers.items()})


class Quantized:
    """Quantize keys and values of the prefix.

    Args:
        bits: 2, 4 or 8 bits a number.
        group: numbers that share a scale and a zero, at most; always a divisor of the head dimension.
        residual: last tokens of the prefix that stay exact.
        backend: "hqq" for integers, "fp8" for 8-bit floating point with one scale a layer.

    Raises:
        InvalidSpec: an option is out of range.
        MissingExtra: hqq is not installed.
    """

    name = "quantized"

    def __init__(
        self, bits: int = 4, group: int = 64, residual: int = 0, backend: Literal["hqq", "fp8"] = "hqq"
    ) -> None:
        if bits not in _BITS or (backend == "fp8" and bits != 8):
            raise InvalidSpec(f"bits={bits} with {backend}", hint="use 2, 4 or 8; fp8 has 8")
        if group < 1 or residual < 0:
            raise InvalidSpec(f"group={group}, residual={residual}", hint="group from 1, residual from 0")
        self.bits, self.group, self.residual, self.backend = bits, group, residual, backend
        self._make_layer(1)  # fails early

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel, exact: Prefill) -> QuantizedPrefix:
        """Quantize a prefill but for its last `residual` tokens, and up to three more for packing's sake."""
        count = max(0, exact.tokens - self.residual) // _PACKED_TOKENS * _PACKED_TOKENS
        layers = {layer.index: self._quantized(exact, layer, count) for layer in exact.layout.compressible}
        return QuantizedPrefix(exact.tokens, layers, ExactLayers.of(model, exact))

    def _quantized(self, exact: Prefill, layout: LayerLayout, count: int) -> QuantizedStates:
        keys = exact.rotated_keys(layout.index).transpose(0, 1)[None]
        values = exact.values(layout.index).transpose(0, 1)[None]
        layer = None
        if count:
            layer = self._make_layer(math.gcd(self.group, layout.head_dim, layout.value_dim))
            layer.update(keys[:, :, :count], values[:, :, :count])
        return QuantizedStates(layer, keys[:, :, count:].clone(), values[:, :, count:].clone())

    def _make_layer(self, group: int) -> DynamicLayer:
        if self.backend == "fp8":
            return _fp8_layer()
        try:
            return HQQQuantizedLayer(nbits=self.bits, axis_key=1, axis_value=1, q_group_size=group)
        except ImportError:
            raise MissingExtra("quantized caches of integers need hqq", extra="quantized") from None


def _fp8_layer() -> DynamicLayer:
    try:
        from transformers.cache_utils import Fp8QuantizedLayer
    except ImportError:
        raise InvalidSpec(
            "backend='fp8' needs a newer Transformers", hint="upgrade transformers, or use backend=hqq"
        ) from None
    return Fp8QuantizedLayer()
