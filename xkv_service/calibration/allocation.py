"""Bits for columns: reverse water-filling over the directions of all groups, keys and values alike.

A direction of energy e that gets b bits costs b bits a token and leaves e d(b) of error, where d is the
distortion of a uniform quantizer of b bits. Given a price of a bit, each direction takes the b that is
cheapest; the price is the lowest whose bits fit. As d is convex over {0, 2, 4, 8} bits for practical purposes
this is the optimal allocation (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
quantizers").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.packed_factors import Runs

# Of a Gaussian source, by the best uniform quantizer of 2 and 4 bits; 8 bits reach 4.5 standard deviations.
DISTORTION = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 1.05e-4}
_STEPS = 80


def allocate(
    energies: Sequence[torch.Tensor], bits_per_token: float, choices: Sequence[int], column_bits: float = 0.0
) -> list[Runs]:
    """Columns and bits of every part (one group's keys or values).

    Args:
        energies: of each part [n], descending, comparable between parts.
        bits_per_token: of all parts together; every part gets one column at least.
        choices: bits a column may have (`packed_factors.BITS`).
        column_bits: what a column costs besides, in bits a token: its row of the bases, when a document
            stores its own.

    Returns:
        The runs of each part; their bits, `column_bits` included, do not pass `bits_per_token` unless the
        single columns alone do.
    """
    price = bit_price(energies, bits_per_token, choices, column_bits)
    offers = _Offers(choices, column_bits)
    return [_runs(offers.bits(one, price), min(choices)) for one in energies]


def bit_price(
    energies: Sequence[torch.Tensor], bits_per_token: float, choices: Sequence[int], column_bits: float = 0.0
) -> float:
    """The lowest price of a bit, in units of energy, at which no more bits than these are bought."""
    offers = _Offers(choices, column_bits)
    joined = torch.cat([one.double().cpu() for one in energies])
    low, high = 0.0, max(float(joined.max()), torch.finfo(torch.float64).tiny)
    for _ in range(_STEPS):
        price = (low * high) ** 0.5 if low else high / 1e6
        if float(offers.cost[offers.choice(joined, price)].sum()) > bits_per_token:
            low = price
        else:
            high = price
    return high


def least_cost(energies: torch.Tensor, price: float, choices: Sequence[int]) -> float:
    """Error left and bits paid, in units of energy, of one part at a price."""
    return float(_Offers(choices, 0.0).totals(energies.double().cpu(), price).min(1).values.sum())


class _Offers:
    """What a column may become: its cost in bits a token and the share of its energy that is lost."""

    def __init__(self, choices: Sequence[int], column_bits: float) -> None:
        self.options = torch.tensor([0, *sorted(choices)])
        self.cost = torch.where(self.options > 0, self.options.double() + column_bits, 0.0)
        self.lost = torch.tensor([DISTORTION[bits] for bits in self.options.tolist()], dtype=torch.float64)

    def totals(self, energies: torch.Tensor, price: float) -> torch.Tensor:
        """[n, options] of [n] energies."""
        return energies[:, None] * self.lost + price * self.cost

    def choice(self, energies: torch.Tensor, price: float) -> torch.Tensor:
        """The cheapest option of each column."""
        return self.totals(energies, price).argmin(1)

    def bits(self, energies: torch.Tensor, price: float) -> torch.Tensor:
        """Bits of each column."""
        return self.options[self.choice(energies.double().cpu(), price)]


def _runs(bits: torch.Tensor, least: int) -> Runs:
    """Runs of equal bits; energies descend, so bits do."""
    found = tuple((b, int((bits == b).sum())) for b in (8, 4, 2) if bool((bits == b).any()))
    return found or ((least, 1),)
