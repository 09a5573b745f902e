"""Kernels read many documents in one launch through tables of addresses.

Documents are loaded one by one, each in memory of its own and of its own length. A kernel finds a document's
tensors by their addresses, int64 numbers on the device, so that documents need neither be copied together
nor be equally long, and a captured CUDA graph runs for other documents when the tables are overwritten. An
address has 64 bits, and so has every offset that kernels add to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNED = 16


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each begins. The caller keeps the tensors alive.

    Raises:
        ValueError: a tensor does not begin at a multiple of 16 bytes.
    """
    found = [tensor.data_ptr() for tensor in tensors]
    for number, address in enumerate(found):
        if address % _ALIGNED:
            raise ValueError(f"tensor {number} begins at byte {address % _ALIGNED} of 16: copy it first")
    return found


def table(columns: Sequence[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
    """Rows [n, sessions] in host memory of what each session has; every row begins at 16 bytes.

    Launches see rows that begin elsewhere as another kind of argument, for which they compile again.
    """
    made = torch.zeros(len(columns[0]), -(-len(columns) // 4) * 4, dtype=dtype)
    made[:, : len(columns)] = numbers(columns, dtype).T
    return made


def numbers(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
    """[sessions, n] in host memory; a row that is the same object for many sessions is read once."""
    places = {id(row): place for place, row in enumerate(rows)}
    if len(places) == len(rows):
        return torch.tensor(rows, dtype=dtype)
    order = {place: number for number, place in enumerate(places.values())}
    made = torch.tensor([rows[place] for place in order], dtype=dtype)
    return made[torch.tensor([order[places[id(row)]] for row in rows])]


def upload(made: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table of at most a few kilobytes on the device, written in the order of the stream's work.

    The driver takes such a copy's source before it returns, so nothing waits for the device.
    """
    return made.to(device, non_blocking=True)
