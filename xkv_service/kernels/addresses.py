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


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [n] on the tensors' device: where each begins. The caller keeps the tensors alive.

    Raises:
        ValueError: a tensor does not begin at a multiple of 16 bytes.
    """
    found = [tensor.data_ptr() for tensor in tensors]
    for number, address in enumerate(found):
        if address % _ALIGNED:
            raise ValueError(f"tensor {number} begins at byte {address % _ALIGNED} of 16: copy it first")
    return torch.tensor(found, dtype=torch.int64).to(tensors[0].device)
