"""Copies of 16-bit keys and values, four numbers at a time (reference: `Tensor.copy_`).

PyTorch copies strided memory number by number. A cache is [heads, tokens, D]; factorization wants its rows.
"""

from __future__ import annotations

import torch

_WIDE = torch.int64


def copy_states(target: torch.Tensor, states: torch.Tensor) -> None:
    """Write `states` [t, heads, D] to `target`, of the same shape and any float dtype."""
    if target.dtype == states.dtype and _can_widen(target) and _can_widen(states):
        target, states = target.view(_WIDE), states.view(_WIDE)
    target.copy_(states)


def _can_widen(states: torch.Tensor) -> bool:
    """Whether memory on an accelerator can be looked at as 8-byte numbers."""
    numbers = _WIDE.itemsize // states.dtype.itemsize
    places = (states.shape[-1], states.storage_offset(), *states.stride()[:-1])
    return (
        states.device.type != "cpu"
        and states.dtype.itemsize == 2
        and states.stride(-1) == 1
        and all(place % numbers == 0 for place in places)
    )
