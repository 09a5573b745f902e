"""Metrics: definite, and every layer's variance costs what its tolerance says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from xkv_service.calibration.calibration import KINDS
from xkv_service.calibration.metrics import WEIGHTINGS, Metrics, Shape, Weighting
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.tolerance import LIMIT, Tolerances, no_tolerances
from xkv_service.factorization.weights import metric_weights

HEADS, DIM, LAYERS = 2, 16, 3


def definite(seed: int) -> torch.Tensor:
    roots = torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return roots @ roots.mT + 1e-3 * torch.eye(DIM, dtype=torch.float64)


def shapes(output: Sequence[torch.Tensor | None]) -> dict[Shape, Sequence[torch.Tensor | None]]:
    """Every layer has queries of its own."""
    queries = [definite(place) for place in range(LAYERS)]
    return {"query": queries, "covariance": [2 * one + definite(7) for one in queries], "output": output}


def measured(moments: Moments) -> Tolerances:
    """Later layers tolerate less."""
    found = no_tolerances(moments)
    for (place, _), one in found.items():
        one.divergence = [LIMIT / 1000, LIMIT * 10**place, LIMIT * 100 * 10**place]
    return found


@pytest.fixture
def metrics(moments: Moments) -> Metrics:
    return Metrics(moments, measured(moments), shapes([definite(9), None, definite(8)]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_variance_costs_the_same_in_every_shape(
    metrics: Metrics, moments: Moments, weighting: Weighting, kind: str
) -> None:
    """Only where errors fall within the layer differs; how much it counts is its tolerance's."""
    tolerances = measured(moments)
    for place in range(LAYERS):
        metric = metrics.of(weighting)(place, kind)  # type: ignore[arg-type]
        cost = float((torch.block_diag(*metric) * moments.covariance(kind, place)).sum())  # type: ignore[arg-type]
        variance = moments.variance(kind, place)  # type: ignore[arg-type]
        typical = sum(moments.variance(kind, one) for one in range(LAYERS)) / LAYERS  # type: ignore[arg-type]
        worth = 1 / typical if weighting == "plain" else 1 / tolerances[place, kind].error  # type: ignore[index]
        assert cost == pytest.approx(variance * worth)


def test_shapes_are_what_the_weighting_names(metrics: Metrics) -> None:
    def shape(weighting: Weighting, place: int, kind: str) -> torch.Tensor:
        metric = metrics.of(weighting)(place, kind)  # type: ignore[arg-type]
        return metric / metric[0, 0, 0]

    eye, key, value = torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1), definite(0), definite(9)
    full = 2 * key + definite(7)
    key, value, full = key / key[0, 0, 0], value / value[0, 0, 0], full / full[0, 0, 0]
    for weighting, wanted_key, wanted_value in (
        ("plain", eye, eye),
        ("tolerance", eye, eye),
        ("tolerance+query", key, eye),
        ("tolerance+output", eye, value),
        ("tolerance+both", key, value),
        ("tolerance+covariance", full, eye),
        ("tolerance+covariance+output", full, value),
    ):
        torch.testing.assert_close(shape(weighting, 0, "key"), wanted_key)  # type: ignore[arg-type]
        torch.testing.assert_close(shape(weighting, 0, "value"), wanted_value)  # type: ignore[arg-type]
    torch.testing.assert_close(shape("tolerance+both", 1, "value"), eye)  # no output projection


@pytest.mark.parametrize("mean", [0.0, 7.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_layer_that_never_varies_has_a_metric_too(
    moments: Moments, weighting: Weighting, mean: float
) -> None:
    """Values of zeros (a pruned layer), or always the same ones."""
    still = Moments.empty(moments.layers, moments.reach, torch.device("cpu"))
    still.add(moments)
    for kind in KINDS:
        held = still.kind(kind)
        held.products[1] = torch.full_like(held.products[1], mean**2 * still.tokens)
        held.sums[1] = torch.full_like(held.sums[1], mean * still.tokens)
    tolerances = no_tolerances(still)
    metrics = Metrics(still, tolerances, shapes([definite(0), definite(1), definite(2)]))
    for place in range(LAYERS):
        for kind in KINDS:
            metric = metrics.of(weighting)(place, kind)
            assert torch.isfinite(metric_weights(metric).inverses).all()


def test_a_model_of_zeros_has_metrics(moments: Moments) -> None:
    still = Moments.empty(moments.layers, moments.reach, torch.device("cpu"))
    still.tokens = 5
    metrics = Metrics(still, no_tolerances(still), shapes([None] * 3))
    for weighting in WEIGHTINGS:
        assert torch.isfinite(metric_weights(metrics.of(weighting)(0, "key")).inverses).all()
