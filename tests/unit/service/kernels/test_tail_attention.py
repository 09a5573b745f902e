"""Attention over tails, held against softmax in float32."""

from __future__ import annotations

import kernel_samples as samples
import pytest
import torch

from xkv_service.kernels.decode_plainly import tail_attention_plainly
from xkv_service.kernels.tail_attention import append_token, tail_attention
from xkv_service.kernels.tail_table import TailRow, TailTable

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
    tail_attention(query, TailTable.of_rooms(keys, values), counts, out, log, 0.2, size=32)
    expected, logs = tail_attention_plainly(query, keys.nan_to_num(), values.nan_to_num(), counts, 0.2)
    assert samples.relative(out, expected) < TOLERANCE[dtype]
    assert (log - logs).abs().max() < 1e-4


def test_no_tail_takes_no_weight(device: torch.device) -> None:
    keys, values, counts = samples.tails([0], torch.float32, device)
    query = samples.queries(1, torch.float32, device)
    out = torch.full((1, samples.SMALL.query_heads, samples.SMALL.value_dim), torch.nan, device=device)
    log = torch.empty(1, samples.SMALL.query_heads, device=device)
    tail_attention(query, TailTable.of_rooms(keys, values), counts, out, log, 0.2)
    assert not out.any() and (log < -1e38).all()


def test_exact_tokens_stand_before_the_tail(device: torch.device) -> None:
    """Each session's exact tokens, tail and room are tensors of their own; a new token is written first."""
    torch.manual_seed(1)
    shapes, dtype = samples.SMALL, torch.float32
    heads, sizes = shapes.kv_heads, [(0, 3, 8), (40, 0, 4), (5, 70, 80), (5, 2, 9)]
    exact = [
        tuple(torch.randn(e, heads, dim, device=device) for dim in (shapes.dim, shapes.value_dim))
        for e, _, _ in sizes
    ]
    rooms = [
        tuple(torch.randn(heads, room, dim, device=device) for dim in (shapes.dim, shapes.value_dim))
        for _, _, room in sizes
    ]
    held = [n for _, n, _ in sizes]
    tails = [tuple(one[:, : max(1, n)] for one in both) for both, n in zip(rooms, held, strict=True)]
    rows = [TailRow(*one) for one in zip(exact, tails, strict=True)]
    table = TailTable([rows[0]] * 4, device)
    table.overwrite(rows)
    new = (
        torch.randn(heads, 4, shapes.dim, device=device),
        torch.randn(4, heads, shapes.value_dim, device=device),
    )
    before = [[one.clone() for one in both] for both in rooms]
    counts = torch.tensor([*held[:3], -1], dtype=torch.int32, device=device)
    append_token(new[0].transpose(0, 1), new[1], table, counts)
    query = samples.queries(4, dtype, device)
    out = torch.full((4, shapes.query_heads, shapes.value_dim), torch.nan, device=device)
    log = torch.full((4, shapes.query_heads), torch.nan, device=device)
    tail_attention(query, table, counts + 1, out, log, 0.2, size=32)
    for number, ((e, n, _), both) in enumerate(zip(sizes, rooms, strict=True)):
        if number < 3:
            before[number][0][:, n], before[number][1][:, n] = new[0][:, number], new[1][number]
        assert all(torch.equal(a, b) for a, b in zip(both, before[number], strict=True))
        seen = n + 1 if number < 3 else 0
        every = [
            torch.cat([fixed.transpose(0, 1), room[:, :seen]], 1)[None]
            for fixed, room in zip(exact[number], both, strict=True)
        ]
        length = torch.tensor([e + seen], device=device)
        expected, logs = tail_attention_plainly(query[number : number + 1], *every, length, 0.2)
        assert samples.relative(out[number], expected[0]) < TOLERANCE[dtype]
        assert (log[number] - logs[0]).abs().max() < 1e-4


def test_tails_that_kernels_cannot_read_are_refused(device: torch.device) -> None:
    keys, values, _ = samples.tails([3, 4], torch.float32, device)
    none = keys.new_empty(0, *keys.shape[1::2]), values.new_empty(0, *values.shape[1::2])
    with pytest.raises(ValueError, match="rows of tokens"):
        TailRow(none, (keys[0].transpose(1, 2).contiguous().transpose(1, 2), values[0]))
    with pytest.raises(ValueError, match="rooms of one size"):
        TailRow(none, (keys[0], values[0, :, :9].contiguous()))
    with pytest.raises(ValueError, match="bfloat16"):
        TailRow(none, (keys[0].bfloat16(), values[0]))
    with pytest.raises(ValueError, match="other heads"):
        TailRow(none, (keys[0, :1], values[0]))
    with pytest.raises(ValueError, match="same heads"):
        TailTable.of_rooms(keys, values).overwrite(
            [TailRow((none[0][:, :1], none[1][:, :1]), (keys[0, :1], values[0, :1]))] * 2
        )
