"""Score tokens: as attention does, and approximately by the selection index of a prefix.

Every scorer takes the queries of one layer, [kv_heads, rows, D] with the rows of all query heads of a KV head
together, and gives [kv_heads, rows, units], where a unit is one token or one chunk of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from xkv_service.selection.landmarks import Landmarks
from xkv_service.selection.sketch import KeySketch


@dataclass(frozen=True)
class Scoring:
    """How a model turns products of queries and keys into weights.

    Args:
        scaling: factor of the products. softcap: bound of the scores by tanh (Gemma 2), or None.
        sinks: [query_heads], scores of a sink that takes weight and gives nothing (gpt-oss), or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """float32 scores of products of any shape."""
        scores = products.float() * self.scaling
        return scores if self.softcap is None else (scores / self.softcap).tanh() * self.softcap


class Scorer(Protocol):
    """Scores the units of one layer's prefix.

    Attributes:
        unit: tokens of a unit; the last one may have fewer.
    """

    unit: int

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        """float32 [kv_heads, rows, units] for rotated queries [kv_heads, rows, D]."""


class SketchScorer:
    """Scores against a key sketch; the reference is `selection.sketch.scores`.

    A code c = low + 16 high is two 4-bit numbers. low·x + high·y = c·x + high·(y - 16 x), so that the bytes
    are used as they are stored and only the high halves are unpacked.

    Args:
        sketch: on the device of the queries.

    Attributes:
        planes: int16 [kv_heads, P, 2], the planes that the sketch keeps.
    """

    unit = 1

    def __init__(self, sketch: KeySketch) -> None:
        self.planes = sketch.planes
        self._codes = sketch.codes
        self._scales = sketch.scales
        self._dims = sketch.planes.long().flatten(1)

    @property
    def sketch(self) -> KeySketch:
        """What is scored: views."""
        return KeySketch(self.planes, self._codes, self._scales)

    def first(self, tokens: int) -> SketchScorer:
        """The same of the first tokens: views."""
        other = copy.copy(self)
        other._codes, other._scales = self._codes[:tokens], self._scales[:tokens]
        return other

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        index = self._dims[:, None].expand(-1, queries.shape[1], -1)
        picked = queries.float().gather(-1, index)
        low, high = picked[..., 0::2], picked[..., 1::2]
        products = low @ _by_head(self._codes.float())
        products += (high - 16 * low) @ _by_head((self._codes >> 4).float())
        products -= 8 * (low + high).sum(-1, keepdim=True)
        products *= self._scales.t().float()[:, None]
        return products


class JoinedSketches:
    """The scores of several sketches one after the other."""

    unit = 1

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = scorers

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.cat([scorer(queries) for scorer in self.scorers], -1)


def _by_head(index: torch.Tensor) -> torch.Tensor:
    """[units, kv_heads, D] -> a view [kv_heads, D, units]."""
    return index.permute(1, 2, 0)


class LandmarkScorer:
    """Scores whole chunks by the mean of their keys (paper, section 3.3).

    Args:
        landmarks: on the device of the queries.
    """

    def __init__(self, landmarks: Landmarks) -> None:
        self.landmarks, self.unit = landmarks, landmarks.chunk

    def first(self, tokens: int) -> LandmarkScorer:
        """The same of the first tokens, views; the last mean is that of its whole chunk."""
        means = self.landmarks.means[: -(-tokens // self.unit)]
        return LandmarkScorer(Landmarks(means, self.unit))

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        return queries.float() @ _by_head(self.landmarks.means).float()
