"""Put a prefix's factors on the device of the model, each tensor once, beside the work going on there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from xkv_service.factors import LowRank, PrefixFactors

_ON_THE_HOST = ("token_ids", "rotary", "states", "windows", "fidelity", "spec")
"""Read on the CPU, or brought to the device by who uses them."""


def on_device(factors: PrefixFactors, device: torch.device) -> PrefixFactors:
    """The same factors with token factors, bases, index and exact tokens on `device`.

    To a CUDA device they go through pinned memory, on a stream of their own: steps of the model that are
    running go on meanwhile. When this returns, the copies are done, and any stream may read them. Their
    memory belongs to the stream that is current here, so whoever reads them on another stream must have
    finished before the last reference goes.
    """
    if device.type == "cpu":
        return factors
    if device.type != "cuda":
        return _moved(factors, lambda tensor: tensor.to(device))
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # What the allocator hands out may still be read by earlier work of the current stream.
    copying.wait_stream(torch.cuda.current_stream(device))

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":  # made on this device, and not stored yet
            return tensor.to(device)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        with torch.cuda.stream(copying):
            return target.copy_(tensor.pin_memory() if tensor.numel() else tensor, non_blocking=True)

    placed = _moved(factors, copied)
    copying.synchronize()
    return placed


def in_rows(factors: PrefixFactors) -> PrefixFactors:
    """The same factors, those of tokens laid out as the kernels of a decode step gather them (`FactorRows`).

    PyTorch reads them there too: what was copied to be aligned is not needed any more.
    """
    from xkv_service.kernels.factor_rows import FactorRows

    def aligned(half: LowRank) -> LowRank:
        return replace(half, factors=FactorRows.of(half.factors).factors)

    groups = tuple(
        group
        if group.values is None
        else replace(group, keys=aligned(group.keys), values=aligned(group.values))
        for group in factors.groups
    )
    return replace(factors, groups=groups)


def _moved(factors: PrefixFactors, move: Callable[[torch.Tensor], torch.Tensor]) -> PrefixFactors:
    names = [one.name for one in fields(factors) if one.name not in _ON_THE_HOST]
    return replace(factors, **{name: _each(getattr(factors, name), move) for name in names})


def _each(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value with `move` of every tensor in it."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, LowRank) and value.shared is not None:
        return replace(value, factors=_each(value.factors, move))  # the others are shared: see `LayerPrefix`
    if isinstance(value, tuple):
        return tuple(_each(one, move) for one in value)
    if isinstance(value, dict):
        return {key: _each(one, move) for key, one in value.items()}
    # A model of pydantic (a layout) is no dataclass, and holds no tensors.
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _each(getattr(value, one.name), move) for one in fields(value)})
    return value
