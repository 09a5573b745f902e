"""Kernels are launched on the device of their tensors: Triton takes the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from xkv_service.kernels import encode_sketch, rotate, round_columns

KEYS, ANGLES = torch.ones(70, 2, 32), torch.ones(70, 16)
PLANES = torch.zeros(2, 8, 2, dtype=torch.int16)
FACTORS = torch.ones(40, 20)

LAUNCHES = {
    (rotate, "_rotate"): (
        KEYS, lambda: rotate.rotate(KEYS, ANGLES, ANGLES, slice(0, 16, 1), slice(16, 32, 1), KEYS.clone())
    ),
    (encode_sketch, "_encode"): (KEYS, lambda: encode_sketch.encode_sketch(KEYS, PLANES, 7, 8)),
    (round_columns, "_round"): (FACTORS, lambda: round_columns.round_columns(FACTORS, torch.ones(20), 127)),
}  # fmt: skip


class Launcher:
    """Stands in for a kernel: two of them call functions of a device, which nothing interprets."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self._launch()


@pytest.mark.parametrize("kernel", LAUNCHES, ids=lambda kernel: kernel[1])
def test_a_launch_is_on_the_device_of_its_tensors(kernel: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = kernel
    tensor, launch = LAUNCHES[kernel]
    current: list[torch.Tensor] = []
    launched: list[list[torch.Tensor]] = []

    @contextmanager
    def device_of(wanted: torch.Tensor) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(module, name, Launcher(lambda: launched.append(list(current))))
    launch()
    assert len(launched) == 1 and launched[0][0] is tensor
