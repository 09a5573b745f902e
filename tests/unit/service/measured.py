"""Moments of prefills, the rows they are moments of, and calibrations made from them."""

from __future__ import annotations

import copy

import torch
from compressed import random_ids
from transformers import PreTrainedModel

from xkv_service.calibration.bases import shared_group
from xkv_service.calibration.calibration import Calibration, Kind
from xkv_service.calibration.moments import Moments
from xkv_service.prefilling.prefill import prefill
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


def shared(moments: Moments, groups: list[tuple[int, int]], identity: str = "c" * 64) -> Calibration:
    """A calibration of plain metrics: every direction of each (first, count)."""

    def metric(place: int, kind: Kind) -> torch.Tensor:
        heads, dim = moments.energy(kind, place).shape
        return torch.eye(dim, dtype=torch.float64).repeat(heads, 1, 1) / moments.variance(kind, place)

    planes = {}
    for layer in moments.layers:
        pairs = torch.arange(layer.head_dim).reshape(2, -1).T.to(torch.int16)
        planes[layer.index] = pairs.repeat(layer.kv_heads, 1, 1)
    made = tuple(shared_group(moments, first, count, metric) for first, count in groups)
    return Calibration(made, planes, id=identity)


def calibrated(model: PreTrainedModel, size: int = 2, documents: int = 3, tokens: int = 200) -> Calibration:
    """A calibration of random documents in groups of `size`, made on the CPU wherever the model is."""
    if model.device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    found = moments_of(
        [prefill(model, random_ids(tokens, seed=100 + one)) for one in range(documents)], size - 1
    )
    count = len(found.layers)
    return shared(found, [(first, min(size, count - first)) for first in range(0, count, size)])
