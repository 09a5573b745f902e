"""Linear centred kernel alignment (CKA) between layers (Kornblith et al., arXiv 1905.00414, section 3).

Of two layers' states X [T, W] and Y [T, V], features centred: |YᵀX|² / (|XᵀX| |YᵀY|), norms of Frobenius.
1 when one is the other rotated or scaled, 0 when no feature of one goes along with any of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xkv_service.analysis.chunks import ReadChunk, joined_rows

_PANEL_BYTES = 256 * 2**20


def linear_cka(
    read: ReadChunk,
    layers: Sequence[int],
    widths: Sequence[int],
    tokens: int,
    *,
    panel_bytes: int = _PANEL_BYTES,
) -> torch.Tensor:
    """CKA of every pair of layers, from cross-Gram matrices summed chunk by chunk.

    Args:
        read: gives the states of a layer.
        layers: layer indices. widths: features of each.
        tokens: T.
        panel_bytes: about the largest matrix of products held at once; at least one layer's with all.

    Returns:
        float64 [L, L] on the CPU, symmetric, 1 on the diagonal; 0 beside a layer whose states never change.
    """
    count = len(layers)
    alike = torch.zeros(count, count, dtype=torch.float64)
    for first, last in _panels(widths, panel_bytes):
        alike[first:last, first:] = _panel(read, layers[first:], widths[first:], last - first, tokens)
    alike = torch.triu(alike) + torch.triu(alike, 1).T
    norms = alike.diagonal().sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, alike / scale.clamp_min(torch.finfo(torch.float64).tiny), 0).fill_diagonal_(
        1
    )


def _panels(widths: Sequence[int], panel_bytes: int) -> list[tuple[int, int]]:
    """Runs of layers (first, one past the last) whose products with all later layers fit."""
    panels = []
    first = 0
    while first < len(widths):
        most = panel_bytes / (8 * sum(widths[first:]))
        last = first + 1
        while last < len(widths) and sum(widths[first : last + 1]) <= most:
            last += 1
        panels.append((first, last))
        first = last
    return panels


def _panel(
    read: ReadChunk, layers: Sequence[int], widths: Sequence[int], count: int, tokens: int
) -> torch.Tensor:
    """Squared norms [count, L] of the centred cross-Grams of the first `count` layers with all of them."""
    left, width = sum(widths[:count]), sum(widths)
    products = sums = None
    for rows in joined_rows(read, layers, width, tokens):
        if products is None or sums is None:
            products, sums = rows.new_zeros(left, width), rows.new_zeros(width)
        products.addmm_(rows[:, :left].T, rows)
        sums += rows.sum(0)
    assert products is not None and sums is not None
    products.addr_(sums[:left], sums, alpha=-1 / tokens)
    squares = [
        [block.square().sum() for block in torch.split(panel, list(widths), dim=1)]
        for panel in torch.split(products, list(widths[:count]), dim=0)
    ]
    return torch.stack([torch.stack(row) for row in squares]).cpu()
