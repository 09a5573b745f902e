"""Second moments of keys and values over a sample: within layers, and between neighbours up to a distance.

Moments add up, so documents stream by, workers can share them, and nothing else of the sample is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.calibration.calibration import KINDS, Kind
from xkv_service.modeling.layout import LayerLayout
from xkv_service.prefilling.prefilled import Prefill

_CHUNK = 2048
_ROUNDING = 1e-12


@dataclass(eq=False)
class KindMoments:
    """Moments of the keys (before RoPE) or of the values.

    Args:
        products: by position of a layer, float64 [W_i, W_i + W_(i+1) + ...]: sums of x_iᵀ [x_i | x_(i+1) |
            ...] with the neighbours after it up to the distance.
        sums: by position, float64 [W_i].
    """

    products: list[torch.Tensor]
    sums: list[torch.Tensor]

    def add(self, other: KindMoments) -> None:
        """Add the moments of other tokens."""
        for mine, more in zip(self.products + self.sums, other.products + other.sums, strict=True):
            mine += more


@dataclass(eq=False)
class Moments:
    """Moments of all compressible layers over `tokens` tokens: all of full, or all of latent attention.

    Args:
        layers: the layers, in order. reach: neighbours after a layer whose products with it are kept.
        keys, values: latents (MLA) are keys without values, of which there are no moments then.
    """

    layers: tuple[LayerLayout, ...]
    reach: int
    keys: KindMoments
    values: KindMoments
    tokens: int = 0

    @classmethod
    def empty(cls, layers: Sequence[LayerLayout], reach: int, device: torch.device) -> Moments:
        """No tokens yet."""

        def zeros(widths: list[int]) -> KindMoments:
            spans = [sum(widths[i : i + reach + 1]) for i in range(len(widths))]
            shapes = zip(widths, spans, strict=True)
            return KindMoments(
                [torch.zeros(*shape, dtype=torch.float64, device=device) for shape in shapes],
                [torch.zeros(width, dtype=torch.float64, device=device) for width in widths],
            )

        keys = zeros([layer.key_width for layer in layers])
        values = zeros([layer.value_width for layer in layers if layer.kind != "latent"])
        return cls(tuple(layers), reach, keys, values)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What there are moments of."""
        return KINDS if self.values.sums else KINDS[:1]

    def kind(self, kind: Kind) -> KindMoments:
        """Those of the keys or of the values."""
        return self.keys if kind == "key" else self.values

    def observe(self, exact: Prefill, skip: int) -> None:
        """Add a prefix's tokens but its first `skip`, which are kept exact."""
        for start in range(min(skip, exact.tokens - 1), exact.tokens, _CHUNK):
            stop = min(start + _CHUNK, exact.tokens)
            for kind in self.kinds:
                self._add(self.kind(kind), [_rows(exact, layer, kind, start, stop) for layer in self.layers])
            self.tokens += stop - start

    def _add(self, moments: KindMoments, rows: list[torch.Tensor]) -> None:
        for place, mine in enumerate(rows):
            beside = torch.cat(rows[place : place + self.reach + 1], 1)
            moments.products[place].addmm_(mine.T, beside)
            moments.sums[place] += mine.sum(0)

    def add(self, other: Moments) -> None:
        """Add the moments of other tokens of the same model."""
        self.keys.add(other.keys)
        self.values.add(other.values)
        self.tokens += other.tokens

    def gram(self, kind: Kind, first: int, count: int) -> torch.Tensor:
        """XᵀX / tokens of `count` layers from position `first` on, side by side: float64 [W, W].

        Raises:
            ValueError: they reach further than the moments or the layers do.
        """
        if count > self.reach + 1:
            raise ValueError(f"{count} layers: only products of {self.reach + 1} neighbours are kept")
        if first + count > len(self.layers):
            raise ValueError(f"{count} layers from position {first}: there are {len(self.layers)}")
        blocks = self.kind(kind).products[first : first + count]
        widths = [block.shape[0] for block in blocks]
        joined = torch.zeros(sum(widths), sum(widths), dtype=torch.float64, device=blocks[0].device)
        offset = 0
        for block, width in zip(blocks, widths, strict=True):
            joined[offset : offset + width, offset:] = block[:, : sum(widths) - offset]
            offset += width
        upper = joined.triu()
        return (upper + upper.triu(1).T) / self.tokens

    def energy(self, kind: Kind, place: int) -> torch.Tensor:
        """Mean squares of one layer: float64 [kv_heads, D]."""
        diagonal = self.kind(kind).products[place].diagonal() / self.tokens
        return diagonal.reshape(self.layers[place].kv_heads, -1)

    def variance(self, kind: Kind, place: int) -> float:
        """The trace of `covariance`; 0 where it is no more than rounding leaves."""
        mean = self.kind(kind).sums[place] / self.tokens
        energy = float(self.energy(kind, place).sum())
        variance = energy - float(mean.square().sum())
        return variance if variance > _ROUNDING * energy else 0.0

    def covariance(self, kind: Kind, place: int) -> torch.Tensor:
        """Covariance of one layer: float64 [W, W]."""
        mean = self.kind(kind).sums[place] / self.tokens
        return self.gram(kind, place, 1) - torch.outer(mean, mean)


def _rows(exact: Prefill, layer: LayerLayout, kind: Kind, start: int, stop: int) -> torch.Tensor:
    read = exact.keys if kind == "key" else exact.values
    return read(layer.index, start, stop).flatten(1).double()
