"""Analyses of several documents, averaged, with how far apart the documents are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from xkv_service.analysis.prefix_analysis import PrefixAnalysis, SideAnalysis
from xkv_service.analysis.spectra import GroupSpectrum

ENERGIES = (0.90, 0.95, 0.99)
SPECTRUM_POINTS = 128
_DIGITS = 6

Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


@dataclass(frozen=True)
class Spread:
    """A figure over the documents: its mean, the lowest and the highest."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Of one figure a document."""
        return cls(sum(figures) / len(figures), min(figures), max(figures))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(figure, _DIGITS) for name, figure in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Analysis:
    """What `xkv analyze` found.

    Args:
        model: the model's name.
        documents: at least one, all of one model.
    """

    model: str
    documents: tuple[PrefixAnalysis, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers compared."""
        return self.documents[0].layers

    @property
    def sizes(self) -> list[int]:
        """Group sizes that the model has room for."""
        return list(self.documents[0].keys.spectra)

    @property
    def least_tokens(self) -> int:
        """Tokens of the shortest document."""
        return min(document.tokens for document in self.documents)

    @property
    def widest_group(self) -> int:
        """Features of the widest group: of a document with fewer tokens, its rank says nothing."""
        return max(
            group.width
            for side in SIDES
            for groups in self._sides(side)[0].spectra.values()
            for group in groups
        )

    def cka(self, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the CKA over the documents, float64 [L, L] each."""
        found = torch.stack([one.cka for one in self._sides(side)])
        return found.mean(0), found.std(0, correction=0)

    def neighbours(self, side: Side) -> Spread:
        """CKA of layers that follow each other, averaged over the pairs; of a single layer 1."""
        pairs = [one.cka.diagonal(1) for one in self._sides(side)]
        return Spread.of([float(pair.mean()) if pair.numel() else 1.0 for pair in pairs])

    def share_of_width(self, side: Side, size: int, energy: float) -> Spread:
        """Rank that holds a share of the energy over the group's width, averaged over the groups."""
        return Spread.of([_mean_share(one.spectra[size], energy) for one in self._sides(side)])

    def rank_per_layer(self, side: Side, size: int, energy: float) -> Spread:
        """That rank over the layers in the group: numbers kept a token and layer."""
        found = [[group.rank(energy) / size for group in one.spectra[size]] for one in self._sides(side)]
        return Spread.of([sum(ranks) / len(ranks) for ranks in found])

    def spectrum(self, side: Side, size: int) -> list[tuple[float, float]]:
        """(place in the width, singular value over the largest), 0 to 1: mean of groups and documents."""
        groups = [group for one in self._sides(side) for group in one.spectra[size]]
        width = min(group.width for group in groups)
        places = torch.linspace(0, 1, min(SPECTRUM_POINTS, width), dtype=torch.float64)
        total = torch.zeros_like(places)
        for group in groups:
            values = group.singular_values
            total += values[(places * (group.width - 1)).round().long()] / values[0].clamp_min(1e-300)
        return list(zip(places.tolist(), (total / len(groups)).tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "layers": list(self.layers),
            "documents": [{"document": one.name, "tokens": one.tokens} for one in self.documents],
            **{side: self._side_as_dict(side) for side in SIDES},
        }

    def _sides(self, side: Side) -> list[SideAnalysis]:
        return [one.keys if side == "keys" else one.values for one in self.documents]

    def _side_as_dict(self, side: Side) -> dict[str, Any]:
        mean, deviation = self.cka(side)
        return {
            "cka": {"mean": _rounded(mean), "deviation": _rounded(deviation)},
            "neighbours": self.neighbours(side).as_dict(),
            "groups": [self._size_as_dict(side, size) for size in self.sizes],
        }

    def _size_as_dict(self, side: Side, size: int) -> dict[str, Any]:
        return {
            "size": size,
            "ranks": [
                {
                    "energy": energy,
                    "share_of_width": self.share_of_width(side, size, energy).as_dict(),
                    "rank_per_layer": self.rank_per_layer(side, size, energy).as_dict(),
                }
                for energy in ENERGIES
            ],
            "spectrum": [[round(x, _DIGITS), round(y, _DIGITS)] for x, y in self.spectrum(side, size)],
        }


def _mean_share(groups: Sequence[GroupSpectrum], energy: float) -> float:
    return sum(group.rank(energy) / group.width for group in groups) / len(groups)


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(figure, _DIGITS) for figure in row] for row in matrix.tolist()]
