"""Whether kernels compile and compute on a device: one of them, on a few numbers."""

from __future__ import annotations

import torch

from xkv_service.kernels.decode_plainly import tail_attention_plainly
from xkv_service.kernels.tail_attention import tail_attention
from xkv_service.kernels.tail_table import TailTable


def error_of_kernels(device: torch.device) -> float:
    """Relative error of a kernel against its reference, in float32."""
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
    return float((out - expected).norm() / expected.norm())
