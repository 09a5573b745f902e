"""A launch of the kernels, held against PyTorch's attention to the very tokens that it chose."""

from __future__ import annotations

import kernel_samples as samples
import torch

from xkv_service.decoding.attend import attend
from xkv_service.decoding.kernel_step import rebuilt_tokens
from xkv_service.decoding.scoring import Scoring
from xkv_service.decoding.select import Choosing, Recorded, Repeated, Selected, Selection
from xkv_service.kernels.choose_tokens import ChooseTokens

EXACT = 2e-5
"""Relative error of one launch's output, given its choice."""
EXCHANGED = 3
"""Tokens of one choice at most that PyTorch exchanges for others; by landmarks those of one chunk."""


def check(
    selection: Selection, tail: tuple[torch.Tensor, torch.Tensor], query: torch.Tensor, scaling: float,
    chosen: ChooseTokens, session: int, out: torch.Tensor,
) -> None:  # fmt: skip
    """Hold one token's attention of one layer, and its choice, against PyTorch's.

    Args:
        selection: the layer's. tail: keys and values [1, kv_heads, n, D], the token's own the last.
        query: [query_heads, D]. chosen: what the kernels chose for all sessions. session: the token's.
        out: [query_heads, Dv], what the kernels gave.
    """
    positions = chosen.positions[session, : chosen.counts[session]].long()

    def in_pytorch(choosing: Choosing) -> torch.Tensor:
        return attend(query[None, :, None], *tail, None, choosing, Scoring(scaling))[0][0, 0]

    expected = in_pytorch(Repeated(selection.prefix, [Selected(positions)]))
    assert samples.relative(out, expected) < EXACT
    assert len(positions) <= rebuilt_tokens(selection)
    if not selection.reuses:
        in_pytorch(own := Recorded(selection))
        exchanged = EXCHANGED if selection.unit == 1 else selection.unit
        assert int(torch.isin(positions, own.made[0].positions).sum()) >= len(positions) - exchanged
        assert len(positions) == rebuilt_tokens(selection) or selection.unit > 1
