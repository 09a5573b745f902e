"""What a report shows of a calibration besides its measurements: plans and spectra, as plain JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.plan import ColumnPlan, factor_bits
from xkv_service.modeling.layout import LayerLayout

POINTS = 40
PLAN_TOKENS = 4096
_TINY = torch.finfo(torch.float64).tiny


def plans(
    calibration: Calibration, ratios: Sequence[float], layers: Sequence[LayerLayout]
) -> dict[str, list[dict[str, Any]]]:
    """By ratio: columns and bits of each group, from the bytes that `plan.factor_bits` leaves for factors.

    Args:
        layers: the layers that are compressed.
    """
    return {f"{ratio:g}": _plan(calibration, ratio, factor_bits(layers, ratio)) for ratio in ratios}


def _plan(calibration: Calibration, ratio: float, bits_per_token: float) -> list[dict[str, Any]]:
    chosen = ColumnPlan(calibration, calibrated_spec(ratio, calibration), PLAN_TOKENS).runs(bits_per_token)
    return [
        {
            "layers": list(group.layers),
            "key": [list(run) for run in keys],
            "value": [list(run) for run in values],
        }
        for group, (keys, values) in zip(calibration.groups, chosen, strict=True)
    ]


def spectra(moments: Moments, sizes: Sequence[int] = (1, 2, 4, 8)) -> dict[str, dict[str, list[list[float]]]]:
    """By "key" and "value", then by layers in a group: (share of the width, share of the energy that so many
    directions hold), the mean over whole groups."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for kind in moments.kinds:
        for size in (one for one in sizes if one <= min(moments.reach + 1, len(moments.layers))):
            starts = range(0, len(moments.layers) - size + 1, size)
            kept = torch.stack([_kept(moments.gram(kind, start, size)) for start in starts]).mean(0)
            shares = torch.linspace(1 / POINTS, 1, POINTS)
            pairs = zip(shares.tolist(), kept.tolist(), strict=True)
            found.setdefault(kind, {})[str(size)] = [list(pair) for pair in pairs]
    return found


def _kept(gram: torch.Tensor) -> torch.Tensor:
    """Share of the energy in the leading 1/POINTS, 2/POINTS ... of the directions: [POINTS]."""
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    ends = (torch.arange(1, POINTS + 1, device=gram.device) * len(energies) / POINTS).ceil().long() - 1
    kept: torch.Tensor = (energies.cumsum(0) / energies.sum().clamp_min(_TINY))[ends]
    return kept.cpu()
