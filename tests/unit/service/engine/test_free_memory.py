"""What was freed between what is kept goes back to the system."""

from __future__ import annotations

import platform
import time

import psutil
import pytest
import torch

from xkv_service.engine import free_memory
from xkv_service.engine.free_memory import FreeMemory, give_back_free_memory

MIB = 2**20


def held() -> float:
    return float(psutil.Process().memory_full_info().uss) / MIB


def gaps() -> list[torch.Tensor]:
    """Every other one of many tensors that are too small for a mapping of their own: 100 of 200 MiB."""
    tensors = [torch.ones(MIB // 64, dtype=torch.float32) for _ in range(3200)]
    return tensors[::2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory otherwise")
def test_gaps_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back_free_memory()
    before = held()
    kept = gaps()
    grown = held() - before
    assert grown > 150, "glibc keeps what was freed"
    give_back_free_memory()
    assert held() - before < 130 and all(bool((one == 1).all()) for one in kept)

    monkeypatch.setattr(free_memory, "EVERY_S", 0.1)
    more = gaps()
    collector = FreeMemory()
    try:
        end = time.monotonic() + 60
        while held() - before > 260:
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        collector.close()
    assert len(more) == len(kept)
