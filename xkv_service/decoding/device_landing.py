"""From a blob to a CUDA device: read into pinned memory, checked, copied while other tensors are read."""

from __future__ import annotations

import os

import torch

from xkv_service.decoding.placing import Copies

MOST_THREADS = 16
"""One core checks 1 to 2 GB/s, so 16 keep up with the copies; more would take cores from whoever serves."""
_ON_THE_DEVICE = (".sketch.codes", ".sketch.scales", ".landmarks", ".rope_key")


class DeviceLanding:
    """As `xkv_artifacts.read_ahead.Landing`: token factors, bases and index go to the device, the rest stays.

    Pinned memory is PyTorch's, which keeps a buffer until its copy is done and gives it out again. At most
    three parts are in it.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._copies = Copies(device)

    def buffer(self, name: str, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], pinned where it is copied from."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=goes_to_device(name))

    def placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, its copy begun, or as it is."""
        return self._copies.copy(tensor) if goes_to_device(name) else tensor

    def join(self) -> None:
        """Let what comes on the stream that was current when this was made wait for the copies begun."""
        self._copies.join()


def goes_to_device(name: str) -> bool:
    """Whether a stored tensor is read by the device alone; the others are looked at on the CPU first."""
    return name.startswith("group.") and not name.endswith(".scales") or name.endswith(_ON_THE_DEVICE)


def landing_for(device: torch.device) -> DeviceLanding | None:
    """Where a prefix for `device` is read to; None: to the CPU's memory, part by part."""
    return DeviceLanding(device) if device.type == "cuda" else None
