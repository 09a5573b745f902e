"""Rebuilt scores, latent values and the whole layer, held against PyTorch in float32."""

from __future__ import annotations

from dataclasses import replace

import kernel_samples as samples
import pytest
import torch

from xkv_service.kernels.choose_tokens import ChooseTokens
from xkv_service.kernels.decode_attention import DecodeAttention, Tiles
from xkv_service.kernels.decode_plainly import (
    decode_attention_plainly,
    latent_values_plainly,
    projected_output_plainly,
    rebuilt_scores_plainly,
)
from xkv_service.kernels.document_table import DocumentLayer, DocumentTable
from xkv_service.kernels.latent_values import LatentValues
from xkv_service.kernels.projected_output import projected_output
from xkv_service.kernels.rebuilt_scores import rebuilt_scores
from xkv_service.kernels.tail_table import TailTable

# Relative errors of norms. In bfloat16 keys rebuilt and turned, weights and latents have 8 bits each, in
# float16 they have 11.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.25e-3}
SIZES = {"slots": 32, "step": 64}
TILES = Tiles(
    index={"tile": 32, "tiles": 2}, choose={"block": 128, "bins": 256}, scores=SIZES,
    values={"slots": 32, "columns": 64},
    splits=2, output={"columns": 32, "step": 64},
)  # fmt: skip


def chosen_by_hand(documents: list[DocumentLayer], most: int, device: torch.device) -> ChooseTokens:
    """Some tokens for each session, the fewer the later."""
    chosen = ChooseTokens(len(documents), max(one.tokens for one in documents), most, device)
    torch.manual_seed(1)
    for session, document in enumerate(documents):
        count = most - 19 * session
        where = torch.randperm(document.tokens)[:count].sort().values
        chosen.positions[session, :count] = where.to(device)
        chosen.counts[session] = count
    return chosen


CASES = [
    ("float", False, 1, samples.SMALL),
    ("int8", True, 2, samples.Shapes(kv_heads=4, rank_k=64, rank_v=128)),
    ("mixed", True, 2, samples.Shapes(rank_k=200, rank_v=150)),
    ("float", True, 2, samples.Shapes(kv_heads=1, group=6, dim=64, value_dim=64)),
]
PACKED = samples.Shapes(rank_k=90, rank_v=140)


@pytest.mark.parametrize(
    ("kind", "scaled", "together", "shapes", "dtype"),
    [
        *((*case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
        ("8+2", True, 2, PACKED, torch.float32),
        ("4", True, 2, PACKED, torch.bfloat16),
        ("4", False, 2, PACKED, torch.float32),
        ("2", True, 1, PACKED, torch.float32),
        ("mixed", True, 2, samples.Shapes(rank_k=200, rank_v=150), torch.float16),
    ],
)
def test_each_stage_is_its_reference(
    kind: str, scaled: bool, together: int, shapes: samples.Shapes, dtype: torch.dtype, device: torch.device
) -> None:
    """Of three sessions, two of them on one document; the other one's ranks are others."""
    fewer = replace(shapes, rank_k=shapes.rank_k - 21, rank_v=shapes.rank_v - 37)
    made = [
        samples.document(size, kind, dtype, device, one, size, scaled)
        for size, one in ((90, fewer), (70, shapes))
    ]
    documents, most = [made[0], made[1], made[1]], 60
    chosen = chosen_by_hand(documents, most, device)
    table = DocumentTable(documents, [1, 1, 1])
    query, turns = samples.queries(3, dtype, device, shapes), samples.turns(torch.float32, device, shapes)
    scores = torch.full((3, shapes.query_heads, most), torch.nan, device=device)
    rebuilt_scores(query, chosen, table, turns, scores, 0.2, together=together, **SIZES)
    values = LatentValues(3, shapes.query_heads, shapes.rank_v, device, splits=2)
    for one in (values.latents, values.peaks, values.sums):
        one.fill_(torch.nan)
    values(scores, chosen, table, slots=32, columns=64)
    rest = torch.randn(3, shapes.query_heads, shapes.value_dim, device=device)
    rest_log = torch.randn(3, shapes.query_heads, device=device)
    out = torch.full_like(rest, torch.nan)
    projected_output(values, rest, rest_log, table, out, columns=32, step=64)
    for session, document in enumerate(documents):
        used = int(chosen.counts[session])
        positions = chosen.positions[session, :used]
        found = scores[session, :, :used]
        expected = rebuilt_scores_plainly(query[session], document, positions, turns, 0.2)
        assert samples.relative(found, expected) < TOLERANCE[dtype]
        latents, log = latent_values_plainly(found, document, positions)
        peak = values.peaks[session].amax(0)
        shrink = (values.peaks[session] - peak).exp()
        total = (values.sums[session] * shrink).sum(0)
        written = values.latents[session, ..., : latents.shape[1]]
        merged = (written * shrink[..., None]).sum(0) / total[..., None]
        assert samples.relative(merged, latents) < TOLERANCE[dtype]
        assert (peak + total.log() - log).abs().max() < 1e-4
        output = projected_output_plainly(latents, log, rest[session], rest_log[session], document)
        assert samples.relative(out[session], output) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("interleaved", "dtype", "chunk"),
    [
        (False, torch.float32, 0),
        (True, torch.float32, 0),
        (False, torch.float16, 0),
        (False, torch.float32, 4),
        (True, torch.float16, 8),
    ],
)
def test_a_layer_is_its_reference(
    interleaved: bool, dtype: torch.dtype, chunk: int, device: torch.device
) -> None:
    """Documents of different lengths, one with several sessions; budgets above and below a document."""
    budgets = [16, 24, 24, 8, 504]
    made = [samples.document(size, "int8", dtype, device, seed=size, chunk=chunk) for size in (150, 99, 40)]
    documents = [made[number] for number in (0, 1, 1, 1, 2)]
    table = DocumentTable(documents, budgets)
    # Powers of 2 are not rounded in half precision: the choice is the same.
    query = (2.0 ** torch.randint(-1, 2, (5, 8, 32), device=device)).to(dtype)
    turns = samples.turns(dtype, device)
    keys, values, lengths = samples.tails([5, 1, 40, 8, 64], dtype, device)
    tiles = replace(TILES, index={"tile": 16}) if chunk else TILES
    layer = DecodeAttention(table, 8, 32, 32, 150, 150, turns, 0.2, interleaved=interleaved, tiles=tiles)
    out = torch.full((5, 8, 32), torch.nan, device=device)
    rooms = TailTable.of_rooms(keys, values)
    layer(query, rooms, lengths, table, out)
    tail = keys.nan_to_num(), values.nan_to_num()
    expected = decode_attention_plainly(
        query, tail, lengths, documents, budgets, turns, 0.2, bins=256, interleaved=interleaved
    )
    assert samples.relative(out, expected) < TOLERANCE[dtype]
    again = torch.full_like(out, torch.nan)
    layer(query, rooms, lengths, table, again, repeat=True)
    assert torch.equal(again, out)


def test_shapes_that_kernels_do_not_take_are_refused(device: torch.device) -> None:
    document = samples.document(40, "float", torch.float32, device)
    table = DocumentTable([document], [8])
    turns = samples.turns(torch.float32, device)
    with pytest.raises(ValueError, match="query heads"):
        DecodeAttention(table, 7, 32, 32, 40, 40, turns, 0.2)
    with pytest.raises(ValueError, match="powers of 2"):
        DecodeAttention(table, 8, 48, 32, 40, 40, turns, 0.2)
    with pytest.raises(ValueError, match="half as many"):
        DecodeAttention(table, 8, 64, 32, 40, 40, turns, 0.2)
    for other in (
        samples.document(40, "int8", torch.float32, device),
        samples.document(40, "float", torch.float32, device, chunk=8),
    ):
        with pytest.raises(ValueError, match="the same bits"):
            DocumentTable([document, other], [8, 8])


def test_tiles_that_would_compute_wrongly_are_refused(device: torch.device) -> None:
    table = DocumentTable([samples.document(40, "int8", torch.float32, device)], [8])
    turns = samples.turns(torch.float32, device)
    keys, values, lengths = samples.tails([5], torch.float32, device)
    query, out = torch.ones(1, 8, 32, device=device), torch.empty(1, 8, 32, device=device)
    for name, options, match in (
        ("values", {"slots": 16}, "fewer than 32"),
        ("output", {"step": 128}, "does not divide"),
    ):
        tiles = replace(TILES, **{name: {**getattr(TILES, name), **options}})
        layer = DecodeAttention(table, 8, 32, 32, 40, 40, turns, 0.2, tiles=tiles, rank=60)
        with pytest.raises(ValueError, match=match):
            layer(query, TailTable.of_rooms(keys, values), lengths, table, out)
