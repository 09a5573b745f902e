"""Attention of many sessions to one document by cuDNN (reference: `parts_plainly` in `decode_plainly.py`).

On Hopper cuDNN multiplies at 640 TFLOP/s where a Triton kernel has 350, but it does not divide a document
among programs: it gets its parts as a batch. Its shapes and addresses are fixed, so a CUDA graph that has it
is one of these very documents.
"""

from __future__ import annotations

from typing import Final

import torch

from xkv_service.decoding.rebuilt_prefix import States
from xkv_service.kernels.probe import passes

LEAST: Final = 8_192
"""Tokens of a document below which it reads none: at 4,096 no gain was seen (docs/performance.md)."""
_UNIT: Final = 64
"""Tokens that each part is a multiple of."""
_PROGRAMS: Final = 128
"""That it shall have, one for up to 128 rows of a head and part: an H100 has 132 multiprocessors."""


def cudnn_parts(heads: int, rows: int) -> int:
    """Into how many parts, a power of 2, a document is divided for so many rows of each head of keys."""
    most = max(1, _PROGRAMS // (heads * -(-rows // 128)))
    return 1 << (most.bit_length() - 1)


def cudnn_tokens(states: States, tokens: int, parts: int) -> int:
    """How many of a document's first `tokens` tokens cuDNN shall read: 0 where it does not run."""
    keys, values = states.keys, states.values
    fits = keys.shape[2] == values.shape[2] <= 128 and keys.shape[2] % 8 == 0
    halves = keys.dtype in (torch.bfloat16, torch.float16)
    if tokens < LEAST or not fits or not halves or not cudnn_runs(keys.device):
        return 0
    return tokens // (parts * _UNIT) * parts * _UNIT


def attend_by_parts(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows of queries to each of some equal parts of a document.

    Args:
        rows: [kv_heads, m, D]. keys, values: [kv_heads, tokens, D], each head contiguous.

    Returns:
        [parts, kv_heads, m, D] in the dtype of `rows`, and float32 [parts, kv_heads, m], the natural
        logarithms of sums of exponentials; both contiguous.
    """
    heads, _, dim = keys.shape
    keys, values = (one.view(heads, parts, -1, dim).transpose(0, 1) for one in (keys, values))
    found, logs, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        rows.expand(parts, -1, -1, -1), keys, values, None, True, scale=scaling
    )
    return found.contiguous(), logs.view(found.shape[:-1]).contiguous()


def cudnn_runs(device: torch.device) -> bool:
    """Whether cuDNN attends on a device, and is quick there: found out once a process, by a trial."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and passes(_try_parts, device)
    )


def _try_parts(device: torch.device) -> float:
    """Equal scores: each row's result is the mean of its head's values, and the log that of the tokens."""
    heads, rows, dim, parts = 2, 256, 128, 4
    ones = torch.ones(heads, 2 * parts * _UNIT, dim, dtype=torch.bfloat16, device=device)
    values = ones * torch.arange(1, heads + 1, device=device, dtype=torch.bfloat16)[:, None, None]
    found, logs = attend_by_parts(ones[:, :rows], torch.zeros_like(ones), values, dim**-0.5, parts)
    wrong = (found - values[None, :, :rows]).abs().max()
    return float(wrong) + float((logs.exp() * parts / ones.shape[1] - 1).abs().max())
