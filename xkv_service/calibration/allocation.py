"""Bits for columns: reverse water-filling over the directions of all groups, keys and values alike.

A direction of energy e that gets b bits costs b bits a token and leaves e d(b) of error, where d is the
distortion of a uniform quantizer of b bits. What a bit saves falls with every step from one width to the
next, so buying the steps that save most, while there are bits, is the optimal allocation (Shoham and Gersho,
"Efficient bit allocation for an arbitrary set of quantizers").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.packed_factors import Runs

# Of a Gaussian source, by the best uniform quantizer of 2 and 4 bits; 8 bits reach 4.5 standard deviations.
DISTORTION = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 1.05e-4}


def least_cost(energies: torch.Tensor, price: float, choices: Sequence[int]) -> float:
    """Error left and bits paid, in units of energy, of one part at a price."""
    widths = (0, *choices)
    lost = torch.tensor([DISTORTION[bits] for bits in widths], dtype=torch.float64)
    paid = price * torch.tensor(widths, dtype=torch.float64)
    return float((energies.double().cpu()[:, None] * lost + paid).amin(1).sum())


@dataclass(frozen=True)
class _Step:
    """From one width to `bits`: what it costs, and the share of a column's energy that it saves."""

    bits: int
    cost: float
    saved: float


def _steps(choices: Sequence[int], column_bits: float) -> list[_Step]:
    """The widths worth choosing at some price: each step saves less a bit than the one before."""
    steps: list[_Step] = []
    cost, lost, left = 0.0, DISTORTION[0], sorted(choices)
    while left:
        further = [_Step(bits, bits + column_bits - cost, lost - DISTORTION[bits]) for bits in left]
        best = max(further, key=lambda step: step.saved / step.cost)
        steps.append(best)
        cost, lost, left = cost + best.cost, lost - best.saved, [bits for bits in left if bits > best.bits]
    return steps


class Offers:
    """What bits can buy: every step of every column, those that save most a bit first.

    Args:
        energies: of each part (one group's keys or values) [n], n at least 1, descending, comparable between
            parts.
        choices: bits a column may have (`packed_factors.BITS`).
        column_bits: what a column costs besides, in bits a token: its row of the bases, when a document
            stores its own.
    """

    def __init__(
        self, energies: Sequence[torch.Tensor], choices: Sequence[int], column_bits: float = 0.0
    ) -> None:
        self._steps = _steps(choices, column_bits)
        sizes = torch.tensor([len(one) for one in energies])
        saved = torch.tensor([step.saved / step.cost for step in self._steps], dtype=torch.float64)
        worth = torch.cat([one.double().cpu() for one in energies])[:, None] * saved
        worth[sizes.cumsum(0) - sizes, 0] = torch.inf  # every part has a column
        self._worth, order = worth.flatten().sort(descending=True, stable=True)
        self._step = order % len(saved)
        self._part = torch.repeat_interleave(sizes)[order // len(saved)]
        cost = torch.tensor([step.cost for step in self._steps], dtype=torch.float64)
        self._paid = cost[self._step].cumsum(0)
        self._parts = len(sizes)

    def price(self, bits_per_token: float) -> float:
        """What the next bit would save, in units of energy, when these are spent; 0 if nothing is left."""
        left = self._worth[self._affordable(bits_per_token) :]
        return float(left[0]) if len(left) else 0.0

    def runs(self, bits_per_token: float) -> list[Runs]:
        """The columns of each part. Their bits, `column_bits` included, do not pass `bits_per_token`, unless
        one column of each part does alone.
        """
        count, steps = self._affordable(bits_per_token), len(self._steps)
        taken = torch.bincount(self._part[:count] * steps + self._step[:count], minlength=self._parts * steps)
        return [self._runs([*part, 0]) for part in taken.reshape(self._parts, steps).tolist()]

    def _affordable(self, bits: float) -> int:
        """How many of the first steps so many bits buy; nothing is paid for what saves nothing."""
        wanted = int((self._worth > 0).sum())
        return max(self._parts, min(wanted, int((self._paid <= bits).sum())))

    def _runs(self, taken: list[int]) -> Runs:
        """Of the columns that took a step, those that did not take the next one have its bits."""
        each = zip(self._steps, taken, taken[1:], strict=False)
        return tuple((step.bits, mine - further) for step, mine, further in each if mine > further)[::-1]
