"""Spectra of groups of layers against a plain singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_service.analysis.spectra import GroupSpectrum, group_spectra


def _layers(tokens: int = 80) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(tokens, 5)
    return [shared @ torch.randn(5, 6) + 0.1 * torch.randn(tokens, 6) for _ in range(5)]


def test_singular_values_are_those_of_the_layers_side_by_side() -> None:
    layers = _layers()
    found = group_spectra(lambda i, a, b: layers[i][a:b], range(5), [6] * 5, 80, (1, 2, 4, 8))
    assert [group.layers for group in found[2]] == [(0, 1), (2, 3)]  # complete groups only
    assert [len(groups) for groups in found.values()] == [5, 2, 1, 0]
    for groups in found.values():
        for group in groups:
            joined = torch.cat([layers[i] for i in group.layers], 1).double()
            torch.testing.assert_close(group.singular_values, torch.linalg.svdvals(joined))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99, 1.0])
def test_rank_is_the_least_whose_truncation_holds_the_energy(share: float) -> None:
    layers = _layers()
    joined = torch.cat(layers[:2], 1).double()
    (group,) = group_spectra(lambda i, a, b: layers[i][a:b], [0, 1], [6, 6], 80, [2])[2]
    rank = group.rank(share)
    total, values = joined.square().sum(), torch.linalg.svdvals(joined).square()
    assert values[:rank].sum() >= share * total * (1 - 1e-12)
    assert values[: rank - 1].sum() < share * total


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_rank_is_between_one_and_the_width(values: list[float], share: float) -> None:
    spectrum = GroupSpectrum((0,), torch.tensor(sorted(values, reverse=True), dtype=torch.float64))
    assert 1 <= spectrum.rank(share) <= spectrum.width
    assert spectrum.rank(share / 2) <= spectrum.rank(share)


def test_a_document_shorter_than_the_width_has_no_rank_above_it() -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 12)
    (group,) = group_spectra(lambda i, a, b: states[a:b], [0], [12], 5, [1])[1]
    assert group.width == 12
    assert group.rank(0.999999) == 5
