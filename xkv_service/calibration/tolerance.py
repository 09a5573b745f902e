"""How much error each layer's keys and values may have before the model's predictions change.

White noise, as bit allocation leaves it (no direction gets more than its own variance), is added to one
layer's keys or values at a time, the others exact, and the divergence of the predictions of the probes is
measured. Infinitesimal noise would not do: retrieval stands a lot and then breaks at once, so the noise grows
until the divergence reaches a fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from xkv_service.calibration.calibration import Kind
from xkv_service.calibration.limits import LOST
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.probes import Probe, exact_cache, predictions
from xkv_service.fidelity import compare_distributions
from xkv_service.modeling.rotary import rotate_planes
from xkv_service.prefilling.prefilled import Prefill

SHARES = (0.01, 0.1, 1.0)
"""Noise tried, as a share of the layer's own variance."""
LIMIT = LOST
"""Divergence (nats) that a single layer's error may cause."""
_MOST = 4.0


@dataclass
class Tolerance:
    """Divergence caused by noise, by layer and kind.

    Args:
        noise: mean squared noise of a token, for each of `SHARES`. divergence: nats, averaged over documents.
    """

    noise: tuple[float, ...]
    divergence: list[float] = field(default_factory=lambda: [0.0] * len(SHARES))

    @property
    def error(self) -> float:
        """The mean squared error of a token at which the divergence reaches `LIMIT`.

        Between the shares tried it is interpolated; a layer that stands all of its own variance gets up to
        four times that, so that no layer counts for nothing.
        """
        points = list(zip(self.noise, (max(one, 1e-12) for one in self.divergence), strict=True))
        first, last = points[0], points[-1]
        if first[1] > LIMIT:
            return first[0] * LIMIT / first[1]
        for (low, kl_low), (high, kl_high) in zip(points, points[1:], strict=False):
            if kl_low <= LIMIT < kl_high:
                part = math.log(LIMIT / kl_low) / math.log(kl_high / kl_low)
                return float(low * (high / low) ** part)
        return last[0] * min(_MOST, LIMIT / last[1])


Tolerances = dict[tuple[int, Kind], Tolerance]
"""By position of a layer among the compressible ones."""


def no_tolerances(moments: Moments) -> Tolerances:
    """Nothing measured yet."""
    return {
        (place, kind): Tolerance(tuple(share * moments.variance(kind, place) for share in SHARES))
        for place in range(len(moments.layers))
        for kind in moments.kinds
    }


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    exact: Prefill,
    probes: Sequence[Probe],
    moments: Moments,
    tolerances: Tolerances,
    weight: float,
) -> None:
    """Add one document's divergences, times `weight`, to `tolerances`; the most noise is tried first."""
    base = predictions(model, exact_cache(exact), probes)
    generator = torch.Generator(device=exact.device).manual_seed(0)
    for (place, kind), tolerance in tolerances.items():
        layer = moments.layers[place]
        variance, axes = torch.linalg.eigh(moments.covariance(kind, place))
        draw = torch.randn(exact.tokens, len(variance), generator=generator, device=exact.device).double()
        for number in reversed(range(len(SHARES))):
            noise = ((draw * _water_level(variance, SHARES[number]).sqrt()) @ axes.T).float()
            states = _noisy(exact, layer.index, kind, noise)
            other = predictions(model, exact_cache(exact, {(layer.index, kind): states}), probes)
            _, found = compare_distributions(base, other)
            tolerance.divergence[number] += weight * found
            if found < LIMIT / 100:  # less noise would say nothing more
                break


def _water_level(variance: torch.Tensor, share: float) -> torch.Tensor:
    """min(variance, level) with the level at which the sum is `share` of the whole."""
    variance = variance.clamp_min(0)
    low, high = torch.zeros_like(variance.max()), variance.max()
    for _ in range(60):
        middle = (low + high) / 2
        over = variance.clamp_max(middle).sum() > share * variance.sum()
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return variance.clamp_max(high)


def _noisy(exact: Prefill, layer: int, kind: Kind, noise: torch.Tensor) -> torch.Tensor:
    """Keys as cached or values with noise: [T, kv_heads, D]."""
    if kind == "value":
        values = exact.values(layer)
        return values + noise.reshape(values.shape).to(values.dtype)
    keys = exact.keys(layer)
    return rotate_planes(keys + noise.reshape(keys.shape), exact.planes(layer), *exact.cos_sin(layer))
