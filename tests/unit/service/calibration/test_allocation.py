"""Bits go where they save most, and never more than there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_service.calibration.allocation import DISTORTION, Offers, least_cost
from xkv_service.packed_factors import Runs, rank_of

ALL = (2, 4, 8)


@st.composite
def spectra(draw: st.DrawFn) -> list[torch.Tensor]:
    """Descending energies of some parts, some flat, some steep, some zero."""
    parts = []
    for seed in draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5)):
        generator = torch.Generator().manual_seed(seed)
        count, decay = draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 1.0, 6.0]))
        energies = 10.0 ** -(decay * torch.rand(count, generator=generator))
        parts.append(draw(st.sampled_from([0.0, 1.0, 1e4])) * energies.sort(descending=True).values)
    return parts


def allocate(
    energies: list[torch.Tensor], bits: float, choices: tuple[int, ...], column_bits: float = 0.0
) -> list[Runs]:
    return Offers(energies, choices, column_bits).runs(bits)


def bits_of(runs: list[Runs], column_bits: float = 0.0) -> float:
    return sum((bits + column_bits) * count for one in runs for bits, count in one)


def error(energies: list[torch.Tensor], runs: list[Runs]) -> float:
    """What is left of all energy, by the distortions that allocation counts on."""
    total = 0.0
    for one, columns in zip(energies, runs, strict=True):
        bits = [b for b, count in columns for _ in range(count)] + [0] * (len(one) - rank_of(columns))
        total += sum(float(e) * DISTORTION[b] for e, b in zip(one, bits, strict=True))
    return total


@settings(deadline=None)
@given(spectra(), st.floats(0, 2000), st.sampled_from([ALL, (4,), (8,), (2, 8)]), st.sampled_from([0.0, 3.5]))
def test_the_budget_is_kept_and_bits_descend(
    energies: list[torch.Tensor], budget: float, choices: tuple[int, ...], column_bits: float
) -> None:
    runs = allocate(energies, budget, choices, column_bits)
    single = len(energies) * (min(choices) + column_bits)
    assert bits_of(runs, column_bits) <= max(budget, single) + 1e-9
    for one, columns in zip(energies, runs, strict=True):
        assert 1 <= rank_of(columns) <= len(one)
        bits = [b for b, _ in columns]
        assert bits == sorted(set(bits), reverse=True) and set(bits) <= set(choices)


@settings(deadline=None)
@given(spectra(), st.floats(0, 2000))
def test_no_other_allocation_of_as_many_bits_leaves_less(energies: list[torch.Tensor], budget: float) -> None:
    mixed = allocate(energies, budget, ALL)
    for bits in ALL:
        alone = allocate(energies, bits_of(mixed), (bits,))
        if bits_of(alone) <= bits_of(mixed):
            assert error(energies, mixed) <= error(energies, alone) * (1 + 1e-6) + 1e-12


@settings(deadline=None)
@given(spectra(), st.floats(0, 1000), st.floats(0, 1000))
def test_more_bits_are_cheaper_and_leave_less(energies: list[torch.Tensor], one: float, other: float) -> None:
    few, many = sorted((one, other))
    offers = Offers(energies, ALL)
    assert offers.price(few) >= offers.price(many) >= 0
    assert error(energies, offers.runs(few)) >= error(energies, offers.runs(many)) - 1e-9


def test_without_bits_every_part_has_one_column_of_the_least() -> None:
    energies = [torch.tensor([9.0, 1.0]), torch.zeros(3), torch.ones(1)]
    assert allocate(energies, 0.0, ALL) == [((2, 1),)] * 3
    assert allocate(energies, 0.0, (8,)) == [((8, 1),)] * 3


def test_bits_without_limit_go_to_every_direction_with_energy() -> None:
    assert allocate([torch.tensor([5.0, 1e-3, 0.0])], 1e9, ALL) == [((8, 2),)]


def test_a_column_that_costs_more_is_bought_later() -> None:
    """Few columns of many bits, where each has to bring its row of the bases along."""
    energies = [torch.logspace(0, -4, 200)]
    cheap, dear = allocate(energies, 400.0, ALL), allocate(energies, 400.0, ALL, column_bits=16.0)
    assert rank_of(dear[0]) < rank_of(cheap[0])
    assert bits_of(dear, 16.0) <= 400.0


def test_equal_directions_share_what_there_is() -> None:
    """All of one energy have one price: buying all or none would leave the bits unused."""
    (runs,) = allocate([torch.ones(100)], 101.0, ALL)
    assert runs == ((2, 50),)


def test_directions_that_do_not_matter_get_nothing() -> None:
    """The part with a thousandth of the energy is left its one column."""
    energies = [torch.full((10,), 1000.0), torch.full((10,), 1.0)]
    assert allocate(energies, 44.0, (4,)) == [((4, 10),), ((4, 1),)]


@pytest.mark.parametrize("price", [1e-4, 0.1, 10.0])
def test_the_least_cost_is_that_of_the_columns_chosen_at_the_price(price: float) -> None:
    energies = torch.logspace(2, -3, 30).double()
    each = [min(float(e) * DISTORTION[b] + price * b for b in (0, *ALL)) for e in energies]
    assert least_cost(energies, price, ALL) == pytest.approx(sum(each))
