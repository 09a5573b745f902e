"""Attention of many sessions to one document by PyTorch's kernels, to hold `shared_attention` against."""

from __future__ import annotations

import torch

PARTS = {"cascade": 0, "cascade-cudnn": 4, "cascade-cudnn-16": 16}
"""By side of a benchmark, into how many parts a document is cut for cuDNN; 0: FlashAttention reads it whole.

cuDNN does not divide a document among programs, so it gets its parts as a batch. With four, 8 heads and 512
rows of queries an H100 has a program for each of its 132 multiprocessors."""


def rows_of(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Queries of all sessions [batch, query_heads, D] as rows of one attention [1, kv_heads, m, D]."""
    batch, _, dim = query.shape
    return query.view(batch, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)


def over_document(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the rows to each part of a document, and the logs of its sums of exponentials.

    Args:
        rows: [1, kv_heads, m, D]. keys, values: [1, kv_heads, tokens, D]. parts: as in `PARTS`.

    Returns:
        [parts, kv_heads, m, D] and float32 [parts, kv_heads, m].
    """
    if not parts:
        found, log, *_ = torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values)
        return found, log.view(found.shape[:-1])
    heads, dim = keys.shape[1], keys.shape[3]
    keys, values = (one[0].view(heads, parts, -1, dim).transpose(0, 1) for one in (keys, values))
    rows = rows.expand(parts, -1, -1, -1)
    found, log, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(rows, keys, values, None, True)
    return found, log.view(found.shape[:-1])


def merged(
    found: torch.Tensor, log: torch.Tensor, rest: torch.Tensor, rest_log: torch.Tensor
) -> torch.Tensor:
    """Attention [batch, query_heads, D] to all of a document's parts and to the tail.

    Args:
        found, log: as `over_document` returns them. rest, rest_log: of the tail, [batch, query_heads, D] and
            without D.
    """
    parts, heads, _, dim = found.shape
    batch = rest.shape[0]
    found = found.view(parts, heads, batch, -1, dim).transpose(1, 2).reshape(parts, batch, -1, dim)
    log = log.view(parts, heads, batch, -1).transpose(1, 2).reshape(parts, batch, -1)
    share = torch.softmax(torch.cat([log, rest_log[None]]), 0)[..., None]
    return (share[:-1] * found).sum(0) + share[-1] * rest
