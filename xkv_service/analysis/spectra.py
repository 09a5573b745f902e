"""Singular values of groups of layers set side by side, and the rank that holds a share of their energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xkv_service.analysis.chunks import ReadChunk, joined_rows


@dataclass(frozen=True, eq=False)
class GroupSpectrum:
    """One group's singular values.

    Args:
        layers: layer indices of the group.
        singular_values: float64 [W] on the CPU, descending; W features of all its layers.
    """

    layers: tuple[int, ...]
    singular_values: torch.Tensor

    @property
    def width(self) -> int:
        """W, features of all the layers."""
        return self.singular_values.numel()

    def rank(self, share: float) -> int:
        """The smallest rank that holds a share of the energy, 0 to 1: the sum of squared singular values."""
        energy = self.singular_values.square().cumsum(0)
        return 1 + int(torch.searchsorted(energy[:-1], share * energy[-1]))


def group_spectra(
    read: ReadChunk, layers: Sequence[int], widths: Sequence[int], tokens: int, sizes: Sequence[int]
) -> dict[int, list[GroupSpectrum]]:
    """Spectra of all complete groups of neighbours among `layers`, of each size, not centred (as in xKV).

    One Gram matrix of all the layers serves every group: give as many layers as the largest size.

    Args:
        read: gives the states of a layer.
        layers, widths: layer indices and features of each. tokens: T.
        sizes: layers in a group.
    """
    gram = _gram(read, layers, sum(widths), tokens)
    edges = [sum(widths[:number]) for number in range(len(layers) + 1)]
    return {
        size: [
            GroupSpectrum(
                tuple(layers[start : start + size]), _singular_values(gram, edges[start], edges[start + size])
            )
            for start in range(0, len(layers) - size + 1, size)
        ]
        for size in sizes
    }


def _gram(read: ReadChunk, layers: Sequence[int], width: int, tokens: int) -> torch.Tensor:
    total = None
    for rows in joined_rows(read, layers, width, tokens):
        if total is None:
            total = rows.new_zeros(width, width)
        total.addmm_(rows.T, rows)
    assert total is not None
    return total


def _singular_values(gram: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Square roots of the eigenvalues of a block on the diagonal, descending."""
    squares: torch.Tensor = torch.linalg.eigvalsh(gram[start:stop, start:stop])
    return squares.clamp_min(0).sqrt().flip(0).cpu()
