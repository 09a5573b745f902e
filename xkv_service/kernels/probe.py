"""Whether kernels run on a device: one is compiled there, tried on a few numbers and held against PyTorch.

Triton may be missing, or not know the device, or lack the C compiler that it needs. Importing this needs no
Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

DEVICES: tuple[str, ...] = ("cuda",)
"""Kinds of device that kernels beside a decode step are tried on; tests put the CPU in their place."""
_TOLERANCE = 1e-3
"""Relative error of the kernel that is tried, in float32: rounding is far below, nonsense far above."""
_log = logging.getLogger(__name__)

Trial = Callable[[torch.device], float]
"""Runs a kernel on a device and gives its relative error."""
_KNOWN: dict[tuple[Trial, torch.device], bool] = {}


def has_kernels(device: torch.device) -> bool:
    """Whether `rotate`, `encode_sketch`, `round_columns` and `round_odd` run on a device; elsewhere PyTorch
    does it.
    """
    return device.type in DEVICES and passes(try_rounding, device)


def passes(trial: Trial, device: torch.device) -> bool:
    """Whether a kernel, compiled here and now, computes what PyTorch does: found out once a process.

    Where memory is full it does not, and is tried again the next time.
    """
    if (trial, device) not in _KNOWN:
        try:
            error = trial(device)
            reason = None if error <= _TOLERANCE else f"they compute something else here (error {error:.2g})"
        except Exception as failure:  # noqa: BLE001 - whatever a compiler may raise
            if no_memory(failure):
                return False
            reason = f"they do not compile here ({failure})"
        if reason is not None:
            _log.warning("PyTorch in place of kernels on %s: %s", device, reason)
        _KNOWN[trial, device] = reason is None
    return _KNOWN[trial, device]


def no_memory(error: Exception) -> bool:
    """Whether an error says that memory is full: Python's, PyTorch's, CUDA's or Triton's. It may pass."""
    kinds, words = (MemoryError, torch.OutOfMemoryError), ("out of memory", "can't allocate memory")
    return isinstance(error, kinds) or any(some in str(error) for some in words)


def try_rounding(device: torch.device) -> float:
    """`round_columns`: it calls a function of the device, as `encode_sketch` does."""
    from xkv_service.kernels.round_columns import round_columns

    factors, scales = torch.linspace(-4, 4, 280).reshape(40, 7), torch.linspace(0.5, 2, 7)
    found = round_columns(factors.to(device), scales.to(device), 3)
    return _relative(found.cpu().float(), (factors / scales).round().clamp(-3, 3))


def try_attention(device: torch.device) -> float:
    """`tail_attention`: products of tiles, as every kernel of a decode step has them."""
    from xkv_service.kernels.decode_plainly import tail_attention_plainly
    from xkv_service.kernels.tail_attention import tail_attention
    from xkv_service.kernels.tail_table import TailTable

    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(size, generator=generator).to(device)
        for size in ((2, 4, 32), (2, 2, 40, 32), (2, 2, 40, 32))
    )
    lengths = torch.tensor([40, 7], dtype=torch.int32).to(device)
    out, log = torch.empty(2, 4, 32, device=device), torch.empty(2, 4, device=device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call] # Triton launches on the current one
        tail_attention(query, TailTable.of_rooms(keys, values), lengths, out, log, 0.2)
    expected, _ = tail_attention_plainly(query, keys, values, lengths, 0.2)
    return _relative(out, expected)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
