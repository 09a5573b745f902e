"""Which device and dtype a model runs in."""

from __future__ import annotations

from typing import Any

import torch

from xkv_service.errors import DeviceUnavailable

DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(device: str = "auto") -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N" as a torch device.

    Raises:
        DeviceUnavailable: it is not on this machine, or no device at all.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise DeviceUnavailable(
            f"device {device!r} is unknown", hint="use auto, cpu, cuda or cuda:N"
        ) from None
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceUnavailable(f"device {device!r} is not supported", hint="use auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device {device!r} is not here: PyTorch sees {torch.cuda.device_count()} GPUs",
            hint="use --device cpu, or install a PyTorch build and driver for the GPU",
        )
    return resolved


def resolve_dtype(config: Any, dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's dtype on a GPU (bfloat16 when it does not say) and float32 on a CPU.

    On a CPU it is never chosen by speed: the dtype is part of the model's fingerprint, and machines that
    share a store must agree on it.
    """
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    elif device.type == "cpu":
        chosen = torch.float32
    else:
        chosen = config.dtype or config.get_text_config(decoder=True).dtype or torch.bfloat16
    resolved: torch.dtype = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    return resolved
