"""Sums over a sample in a few parts: together they are the sample, drawn again they say how sure it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.calibration.moments import Moments
from xkv_service.calibration.observed import Observed, calibrated_layers, reach_of
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.modeling.layout import ModelLayout

MOST_FOLDS = 8
_MOST_BYTES = 2 << 30


def fold_count(layout: ModelLayout, settings: CalibrationSettings) -> int:
    """Parts to keep a sample's sums in: 8 where they take 2 GiB at most, in wide models down to 2.

    Raises:
        UnsupportedModel: latent attention, which has no calibration.
    """
    device = torch.device("meta")
    empty = Moments.empty(calibrated_layers(layout), reach_of(layout, settings), device)
    size = sum(one.nbytes for kind in (empty.keys, empty.values) for one in kind.products)
    return max(2, min(MOST_FOLDS, _MOST_BYTES // size))


@dataclass(frozen=True)
class Folds:
    """What was observed of a sample, in parts.

    Args:
        parts: of at least one document each; without `earlier` one part at least.
        documents: how many there are in all parts.
        earlier: what another calibration observed before; it is in every sum and never drawn.
        known: how many documents are in `earlier`.
    """

    parts: Sequence[Observed]
    documents: int
    earlier: Observed | None = None
    known: int = 0

    def total(self) -> Observed:
        """All of it, in tensors of its own."""
        return self.drawn(range(len(self.parts)))

    def drawn(self, numbers: Sequence[int]) -> Observed:
        """The sum of some parts, each as often as it is named, and of what is earlier."""
        return total_of([*self._earlier(), *(self.parts[number] for number in numbers)])

    def left_out(self, numbers: Sequence[int]) -> Observed | None:
        """The sum of the parts that are not named; None where all are."""
        others = [part for number, part in enumerate(self.parts) if number not in numbers]
        return total_of(others) if others else None

    def _earlier(self) -> list[Observed]:
        return [] if self.earlier is None else [self.earlier]


def total_of(parts: Sequence[Observed]) -> Observed:
    """The sum of one part or more, which stay as they are."""
    total = copy.deepcopy(parts[0])
    for part in parts[1:]:
        total.add(part)
    return total
