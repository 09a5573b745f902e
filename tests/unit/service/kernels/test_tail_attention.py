"""Attention over tails, held against softmax in float32."""

from __future__ import annotations

import kernel_samples as samples
import pytest
import torch

from xkv_service.kernels.decode_plainly import tail_attention_plainly
from xkv_service.kernels.tail_attention import tail_attention

# bfloat16 rounds the weights to 8 bits: 2^-9 of each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tails_of_any_length(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    lengths = [1, 33, 80]
    keys, values, counts = samples.tails(lengths, dtype, device)
    query = samples.queries(3, dtype, device)
    out = torch.full((3, samples.SMALL.query_heads, samples.SMALL.value_dim), torch.nan, device=device)
    log = torch.full((3, samples.SMALL.query_heads), torch.nan, device=device)
    tail_attention(query, keys, values, counts, out, log, 0.2, size=32)
    expected, logs = tail_attention_plainly(query, keys.nan_to_num(), values.nan_to_num(), counts, 0.2)
    assert samples.relative(out, expected) < TOLERANCE[dtype]
    assert (log - logs).abs().max() < 1e-4


def test_no_tail_takes_no_weight(device: torch.device) -> None:
    keys, values, counts = samples.tails([0], torch.float32, device)
    query = samples.queries(1, torch.float32, device)
    out = torch.full((1, samples.SMALL.query_heads, samples.SMALL.value_dim), torch.nan, device=device)
    log = torch.empty(1, samples.SMALL.query_heads, device=device)
    tail_attention(query, keys, values, counts, out, log, 0.2)
    assert not out.any() and (log < -1e38).all()
