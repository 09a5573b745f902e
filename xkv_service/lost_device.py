"""Whether a device still answers."""

from __future__ import annotations

import torch


def is_lost(device: torch.device) -> bool:
    """Whether nothing can run on a device until its process ends: after an illegal access, say, every call of
    CUDA fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
