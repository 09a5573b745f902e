"""What a layer stands: read off the divergences measured, and measured with noise of the size asked for."""

from __future__ import annotations

import math

import pytest
import torch
from compressed import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from xkv_service.calibration import tolerance as module
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.probes import Probe, exact_cache, predictions
from xkv_service.calibration.tolerance import LIMIT, SHARES, Tolerance, measure, no_tolerances
from xkv_service.fidelity import compare_distributions
from xkv_service.prefilling.prefilled import Prefill

NOISE = (1.0, 10.0, 100.0)
PROBE = Probe(tuple(random_ids(12, seed=5).tolist()), 12)


@pytest.mark.parametrize(
    ("divergence", "error"),
    [
        ([LIMIT / 100, LIMIT, 1.0], 10.0),  # at a share that was tried
        ([LIMIT / 10, LIMIT * 10, 1.0], 10**0.5),  # halfway between two, in logarithms
        ([LIMIT / 4, LIMIT / 2, LIMIT * 8], 10 * 10**0.25),
        ([LIMIT * 5, 1.0, 2.0], 0.2),  # less than the least noise
        ([0.0, 0.0, LIMIT / 2], 200.0),  # more than the layer's own variance
        ([0.0, 0.0, 0.0], 400.0),  # nothing depends on it
        ([math.inf, math.inf, math.inf], 0.0),
        ([0.0, LIMIT, math.inf], 10.0),
    ],
)
def test_the_error_is_where_the_divergence_reaches_the_limit(divergence: list[float], error: float) -> None:
    assert Tolerance(NOISE, divergence).error == pytest.approx(error)


@given(st.lists(st.floats(0, 5), min_size=3, max_size=3))
def test_the_error_tolerated_is_never_more_than_four_times_the_variance(divergence: list[float]) -> None:
    assert 0 <= Tolerance(NOISE, divergence).error <= 400


@given(st.lists(st.floats(1e-6, 5), min_size=3, max_size=3), st.floats(1, 100))
def test_a_layer_that_diverges_more_tolerates_less(divergence: list[float], factor: float) -> None:
    rising = sorted(divergence)
    more = [factor * one for one in rising]
    assert Tolerance(NOISE, more).error <= Tolerance(NOISE, rising).error * (1 + 1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=20), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_the_water_level_keeps_the_share_and_no_direction_passes_it(
    variance: list[float], share: float
) -> None:
    given_variance = torch.tensor(variance, dtype=torch.float64)
    kept = module._water_level(given_variance, share)
    torch.testing.assert_close(kept.sum(), share * given_variance.sum(), rtol=1e-6, atol=1e-9)
    assert (kept <= given_variance).all()
    below = kept < given_variance - 1e-9
    assert kept[below].unique().numel() <= 1


def test_noise_is_as_large_as_its_share_of_the_variance(
    model: PreTrainedModel, prefills: list[Prefill], moments: Moments, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str, float]] = []
    real = module._noisy

    def noisy(exact: Prefill, layer: int, kind: str, noise: torch.Tensor) -> torch.Tensor:
        seen.append((layer, kind, float(noise.square().sum(1).mean())))
        return real(exact, layer, kind, noise)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_noisy", noisy)
    found = no_tolerances(moments)
    measure(model, prefills[0], [PROBE], moments, found, 1.0)
    largest = {(layer, kind): size for layer, kind, size in reversed(seen)}
    assert len(largest) == 6
    for (place, kind), one in found.items():
        assert one.noise == pytest.approx([share * moments.variance(kind, place) for share in SHARES])
        assert largest[moments.layers[place].index, kind] == pytest.approx(one.noise[-1], rel=0.25)


def test_the_prefix_is_left_as_it_was_and_weights_average(
    model: PreTrainedModel, prefills: list[Prefill], moments: Moments
) -> None:
    before = predictions(model, exact_cache(prefills[0]), [PROBE])
    once, twice = no_tolerances(moments), no_tolerances(moments)
    measure(model, prefills[0], [PROBE], moments, once, 1.0)
    for _ in range(2):
        measure(model, prefills[0], [PROBE], moments, twice, 0.5)
    assert torch.equal(predictions(model, exact_cache(prefills[0]), [PROBE]), before)
    for one, other in zip(once.values(), twice.values(), strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-6)
        assert one.divergence[-1] > 0


def test_states_without_noise_are_the_exact_ones(model: PreTrainedModel, prefills: list[Prefill]) -> None:
    exact = prefills[0]
    for kind, cached in (("key", exact.rotated_keys(1)), ("value", exact.values(1))):
        states = module._noisy(exact, 1, kind, torch.zeros(exact.tokens, 32))  # type: ignore[arg-type]
        torch.testing.assert_close(states, cached, atol=1e-5, rtol=1e-5)
    changed = exact_cache(exact, {(1, "value"): exact.values(1) + 100})
    base = predictions(model, exact_cache(exact), [PROBE])
    assert compare_distributions(base, predictions(model, changed, [PROBE]))[1] > 0.001
