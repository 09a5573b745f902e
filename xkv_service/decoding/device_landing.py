"""From a blob to a CUDA device: read into pinned memory, checked, copied while other tensors are read."""

from __future__ import annotations

import os

import torch

from xkv_service.decoding.kernel_choice import kernels_run
from xkv_service.decoding.placing import Copies

MOST_THREADS = 16
"""One core checks 1 to 2 GB/s, so 16 keep up with the copies; more would take cores from whoever serves."""
DEVICE, PINNED, HOST = "device", "pinned", "host"
"""Places: memory of the device, the CPU's that is copied from later, and the CPU's."""
_KEPT = (".sketch.codes", ".sketch.scales", ".landmarks", ".rope_key")
_COPIED_LATER = (".scales", ".exact.positions", ".exact.keys", ".exact.values", ".sketch.planes")


class DeviceLanding:
    """As `xkv_artifacts.read_ahead.Landing`: token factors, bases and index go to the device, the rest stays.

    Blocks of factors and bases share memory there until they are joined. What is kept as it is has memory of
    its own: it stays aligned as the allocator gives it out, and keeps no neighbour. Pinned memory is
    PyTorch's, which keeps a buffer until its copy is done and gives it out again.

    Args:
        device: a CUDA device.
        together: whether no part is handed over before all are read: who uses it meanwhile shares Python's
            lock with the threads that read, and takes eight times as long.
    """

    def __init__(self, device: torch.device, *, together: bool = False) -> None:
        self.threads, self.together = min(MOST_THREADS, len(os.sched_getaffinity(0))), together
        self._copies = Copies(device)

    def place(self, name: str) -> str:
        """As `place_of`."""
        return place_of(name)

    def buffer(self, place: str, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], pinned where it is copied from."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=place != HOST)

    def placed(self, place: str, buffer: torch.Tensor) -> torch.Tensor:
        """The buffer on the device, its copy begun, or as it is."""
        return buffer if place in (HOST, PINNED) else self._copies.copy(buffer)

    def join(self) -> None:
        """Let what comes on the stream that was current when this was made wait for the copies begun."""
        self._copies.join()


def place_of(name: str) -> str:
    """`DEVICE`, `PINNED`, `HOST`, or the name itself: memory of its own on the device."""
    if name.endswith(_KEPT):
        return name
    if name.endswith(_COPIED_LATER):
        return PINNED
    return DEVICE if name.startswith("group.") else HOST


def landing_for(device: torch.device, nbytes: int = 0) -> DeviceLanding | None:
    """Where a prefix for `device` is read to; None: to the CPU's memory, part by part.

    Where kernels run nobody begins a forward beside a load, so its parts may come together, if there is room
    for all of them besides the prefix that is made of them.

    Args:
        nbytes: of the parts.
    """
    if device.type != "cuda":
        return None
    return DeviceLanding(
        device, together=kernels_run(device) and 2 * nbytes < torch.cuda.mem_get_info(device)[0]
    )
