"""Bins of shares: equal widths of their logarithms, from exp(-16) to 1.

Below is nothing that attention would notice. Shares above a whole, which sums of the step before can give,
are in the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST, RANGE = -16.0, 16.0
_LOWEST, _RANGE = tl.constexpr(LOWEST), tl.constexpr(RANGE)


@triton.jit  # type: ignore[untyped-decorator]
def share_levels(share, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bins of logarithms of shares."""
    return tl.minimum(tl.maximum((share - _LOWEST) * (BINS / _RANGE), 0.0), BINS - 1).to(tl.int32)


def share_bins(shares: torch.Tensor, bins: int) -> torch.Tensor:
    """int32, the same in PyTorch."""
    return ((shares - LOWEST) * (bins / RANGE)).clamp(0, bins - 1).int()
