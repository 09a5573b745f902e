"""MiniCache (arXiv 2405.14366): neighbouring layers share the directions of their keys and values.

From `start` on, full-attention layers are taken in pairs. Per token, the keys of both layers are cut into
magnitudes, which each layer keeps, and unit directions, which are merged into one by spherical interpolation;
so are the values. Keys are taken as cached, after RoPE. A token is one vector over all KV heads, as in the
paper's count of its memory. Tokens whose directions lie furthest apart are kept exactly for both layers: here
a fixed share of the tokens, so that the bytes are known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.methods.exact_layers import ExactLayers, filled_layer, number_bytes
from xkv_service.modeling.layout import LayerLayout
from xkv_service.prefilling.prefilled import Prefill

States = tuple[torch.Tensor, torch.Tensor]

_POSITION_BYTES = 4
_PARALLEL = 1e-6  # sine of an angle below which directions are interpolated on a line


@dataclass(frozen=True, eq=False)
class MergedPair:
    """Keys or values of two layers, merged. W is the layers' width, kv_heads times head dimension.

    Args:
        direction: [T, W] in the model's dtype, of length one.
        magnitudes: [2, T], each layer's own.
        positions: int32 [n], tokens kept exactly.
        kept: [2, n, W], their states in each layer.
    """

    direction: torch.Tensor
    magnitudes: torch.Tensor
    positions: torch.Tensor
    kept: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held: numbers at 16 bits, positions at 32."""
        numbers = number_bytes((self.direction, self.magnitudes, self.kept))
        return numbers + _POSITION_BYTES * self.positions.numel()

    def restore(self, member: int) -> torch.Tensor:
        """States [T, W] of the pair's first (0) or second (1) layer."""
        states = self.direction * self.magnitudes[member][:, None]
        states[self.positions.long()] = self.kept[member]
        return states


def merge(first: torch.Tensor, second: torch.Tensor, t: float, retained: int) -> MergedPair:
    """Merge the states of two layers, each [T, W], and keep the `retained` most different tokens exactly."""
    pair = torch.stack((first, second))
    magnitudes = torch.linalg.vector_norm(pair.float(), dim=-1)
    directions = pair.float() / magnitudes.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    merged, angles = slerp(directions[0], directions[1], t)
    positions = angles.topk(retained).indices.sort().values
    return MergedPair(
        direction=merged.to(first.dtype),
        magnitudes=magnitudes.to(first.dtype),
        positions=positions.to(torch.int32),
        kept=pair[:, positions],
    )


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> States:
    """Spherical interpolation between unit vectors, t = 0 giving the first and t = 1 the second.

    Args:
        first, second: float32 [n, W].

    Returns:
        Vectors [n, W], and the angles between the inputs [n] in radians.
    """
    cosine = (first * second).sum(-1).clamp(-1, 1)
    angle = torch.arccos(cosine)
    sine = torch.sin(angle)
    parallel = sine < _PARALLEL
    divisor = torch.where(parallel, torch.ones_like(sine), sine)
    left = torch.where(parallel, torch.full_like(sine, 1 - t), torch.sin((1 - t) * angle) / divisor)
    right = torch.where(parallel, torch.full_like(sine, t), torch.sin(t * angle) / divisor)
    return left[:, None] * first + right[:, None] * second, angle


@dataclass(frozen=True, eq=False)
class MergedPrefix:
    """A prefix whose later layers are merged in pairs.

    Args:
        tokens: T.
        pairs: indices of both layers, and their merged keys and values.
        alone: by layer index, exact keys and values [1, kv_heads, T, D] of layers that are not merged.
        heads: KV heads by layer index.
        others: the layers that are left alone.
    """

    tokens: int
    pairs: dict[tuple[int, int], tuple[MergedPair, MergedPair]]
    alone: dict[int, States]
    heads: dict[int, int]
    others: ExactLayers

    @property
    def nbytes(self) -> int:
        """Bytes held, everything counted."""
        merged = sum(side.nbytes for pair in self.pairs.values() for side in pair)
        return (
            merged + number_bytes(side for both in self.alone.values() for side in both) + self.others.nbytes
        )

    @torch.no_grad()
    def cache(self) -> DynamicCache:
        """An ordinary cache: merged layers are restored here, once, not as the paper does at every step."""
        full = {index: filled_layer(*both) for index, both in self.alone.items()}
        for pair, (keys, values) in self.pairs.items():
            for member, index in enumerate(pair):
                full[index] = filled_layer(
                    self._cached(keys.restore(member), index), self._cached(values.restore(member), index)
                )
        return self.others.cache(full)

    def _cached(self, states: torch.Tensor, index: int) -> torch.Tensor:
        """[T, W] as a cache holds it: [1, kv_heads, T, D]."""
        return states.view(self.tokens, self.heads[index], -1).transpose(0, 1)[None]


class MiniCache:
    """Merge layers in pairs.

    Args:
        start: number of the first full-attention layer that may be merged, by default half of them.
            0 merges every pair, the method's highest ratio.
        t: how far merged directions lie towards the later layer, 0 to 1.
        gamma: share of the tokens kept exactly, 0 to 1.

    Raises:
        InvalidSpec: an option is out of range.
    """

    name = "minicache"

    def __init__(self, start: int | None = None, t: float = 0.6, gamma: float = 0.05) -> None:
        if start is not None and start < 0:
            raise InvalidSpec(f"start={start} is negative", hint="give the number of a layer, 0 or more")
        for option, value in (("t", t), ("gamma", gamma)):
            if not 0 <= value <= 1:
                raise InvalidSpec(f"{option}={value} is out of range", hint=f"give {option} from 0 to 1")
        self.start, self.t, self.gamma = start, t, gamma

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel, exact: Prefill) -> MergedPrefix:
        """Merge the layers of a prefill. Two neighbours of unlike widths stay as they are."""
        layers = exact.layout.compressible
        start = len(layers) // 2 if self.start is None else self.start
        pairs = [
            (first, second)
            for first, second in zip(layers[start::2], layers[start + 1 :: 2], strict=False)
            if _shape(first) == _shape(second)
        ]
        merged = {layer.index for pair in pairs for layer in pair}
        return MergedPrefix(
            tokens=exact.tokens,
            pairs={(a.index, b.index): self._merge(exact, a.index, b.index) for a, b in pairs},
            alone={layer.index: _copied(exact, layer.index) for layer in layers if layer.index not in merged},
            heads={layer.index: layer.kv_heads for layer in layers},
            others=ExactLayers.of(model, exact),
        )

    def _merge(self, exact: Prefill, first: int, second: int) -> tuple[MergedPair, MergedPair]:
        sides = [
            merge(read(first).flatten(1), read(second).flatten(1), self.t, round(self.gamma * exact.tokens))
            for read in (exact.rotated_keys, exact.values)
        ]
        return sides[0], sides[1]


def _shape(layer: LayerLayout) -> tuple[int, int, int]:
    return layer.kv_heads, layer.head_dim, layer.value_dim


def _copied(exact: Prefill, layer: int) -> States:
    keys, values = exact.rotated_keys(layer), exact.values(layer)
    return keys.transpose(0, 1)[None].clone(), values.transpose(0, 1)[None].clone()
