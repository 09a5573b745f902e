"""Moments of prefills, and the rows they are moments of."""

from __future__ import annotations

import torch

from xkv_service.calibration.moments import Moments
from xkv_service.prefilling.prefilled import Prefill

SKIP = 4


def moments_of(prefills: list[Prefill], reach: int = 2, skip: int = SKIP) -> Moments:
    found = Moments.empty(prefills[0].layout.compressible, reach, torch.device("cpu"))
    for one in prefills:
        found.observe(one, skip)
    return found


def rows(prefills: list[Prefill], kind: str, place: int) -> torch.Tensor:
    """float64 [all tokens that count, W] of one layer, in one piece."""
    layer = prefills[0].layout.compressible[place].index
    return torch.cat(
        [(one.keys if kind == "key" else one.values)(layer)[SKIP:].flatten(1).double() for one in prefills]
    )
