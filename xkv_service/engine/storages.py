"""The memory that objects really hold: every tensor storage they reach, once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LEAVES = (nn.Module, type, str, bytes, int, float, torch.dtype, torch.device)


def held_storages(*roots: Any) -> dict[tuple[torch.device, int], int]:
    """Bytes of each distinct tensor storage that `roots` reach, by device and address.

    Views count as the storage they keep alive. Modules, and with them a model's weights, are passed over.
    """
    found: dict[tuple[torch.device, int], int] = {}
    visited: set[int] = set()
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in visited or isinstance(one, _LEAVES):
            continue
        visited.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, list | tuple):
            todo += one
        elif isinstance(one, dict):
            todo += one.values()
        else:
            todo += vars(one).values() if hasattr(one, "__dict__") else ()
    return found


def held_bytes(*roots: Any, device: torch.device, besides: Any = None) -> int:
    """Bytes of the distinct storages on `device` that `roots` reach and `besides` does not."""
    others = held_storages(besides)
    return sum(
        size
        for place, size in held_storages(*roots).items()
        if place[0].type == device.type and place not in others
    )
