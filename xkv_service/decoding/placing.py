"""Put a prefix's factors on the device of the model, each tensor once, beside the work going on there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch

from xkv_service.factors import LowRank, PrefixFactors

_ON_THE_HOST = ("token_ids", "rotary", "states", "windows", "planes", "fidelity", "spec")
"""Read on the CPU, or brought to the device by who uses them."""


def on_device(factors: PrefixFactors, device: torch.device) -> PrefixFactors:
    """The same factors with token factors, bases, index and exact tokens on `device`.

    To a CUDA device they go through pinned memory, on a stream of their own: steps of the model that are
    running go on meanwhile. Whatever comes later on the stream that is current here reads the copies;
    nothing is waited for on the CPU.
    """
    if device.type == "cpu":
        return factors
    if device.type != "cuda":
        return _moved(factors, lambda tensor: tensor.to(device))
    copies = Copies(device)
    placed = _moved(factors, copies.copy)
    copies.join()
    return placed


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU on `device`, copied on the stream that is current.

    A CUDA device is not waited for: its stream may be busy with a forward.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Copies:
    """Copies to a CUDA device on a stream of their own, for readers on the stream that is current now.

    Whoever reads them on a third stream must have finished before the last reference goes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._reader = device, torch.cuda.current_stream(device)
        self._stream = _copying(self._reader.device)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the CPU on the device, its copy begun; one that is there as it is. From any thread."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            target.copy_(tensor.pin_memory(), non_blocking=True)
        # Its memory is given out again when the reader, too, has come past the last use.
        target.record_stream(self._reader)
        return target

    def join(self) -> None:
        """Let what comes later on the reader's stream wait for the copies begun."""
        self._reader.wait_stream(self._stream)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One for all loads: the allocator keeps freed memory for the stream it was allocated on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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
