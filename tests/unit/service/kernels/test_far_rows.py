"""Offsets past 2^31 elements. Memory that nobody touches is not taken, so a CPU has enough of it."""

from __future__ import annotations

from dataclasses import replace

import kernel_samples as samples
import torch

from xkv_service.factorization.quantize import round_odd_plainly, squared_errors_plainly
from xkv_service.kernels.choose_tokens import ChooseTokens
from xkv_service.kernels.decode_plainly import (
    index_shares_plainly,
    latent_values_plainly,
    rebuilt_scores_plainly,
)
from xkv_service.kernels.document_table import DocumentTable
from xkv_service.kernels.factor_rows import FactorRows, RowLayout
from xkv_service.kernels.landmark_scores import LandmarkScores
from xkv_service.kernels.latent_values import LatentValues
from xkv_service.kernels.rebuilt_scores import rebuilt_scores
from xkv_service.kernels.round_odd import pack_odd, squared_errors
from xkv_service.packed_factors import pack

TOKENS, RANK, COUNT = 2**22 + 64, 1024, 20
SHAPES = samples.Shapes(kv_heads=1, group=2, rank_k=RANK, rank_v=RANK)


def test_rows_behind_2_31_elements_are_read(device: torch.device) -> None:
    positions = torch.tensor([*range(COUNT // 2), *range(TOKENS - COUNT // 2, TOKENS)], device=device)
    rows = torch.empty(TOKENS, RANK, dtype=torch.int8, device=device)
    rows[positions] = torch.randint(-127, 128, (COUNT, RANK), dtype=torch.int8, device=device)
    turns = tuple(torch.empty(TOKENS, SHAPES.dim // 2, device=device) for _ in range(2))
    for table in turns:
        table[positions] = torch.randn(COUNT, SHAPES.dim // 2, device=device)
    assert rows.numel() > 2**32 and bool((positions * RANK > 2**31).any())
    far = FactorRows(RowLayout(torch.int8, RANK), rows.view(torch.uint8))
    near = samples.document(30, "int8", torch.float32, device, SHAPES)
    document = replace(near, key_rows=far, value_rows=far)
    chosen = ChooseTokens(1, 30, COUNT, device)
    chosen.positions[0], chosen.counts[0] = positions, COUNT
    query, table = samples.queries(1, torch.float32, device, SHAPES), DocumentTable([document], [8])
    scores = torch.full((1, SHAPES.query_heads, COUNT), torch.nan, device=device)
    rebuilt_scores(query, chosen, table, (turns[0], turns[1]), scores, 0.2, slots=32)
    expected = rebuilt_scores_plainly(query[0], document, chosen.positions[0], (turns[0], turns[1]), 0.2)
    assert samples.relative(scores[0], expected) < 1e-5
    values = LatentValues(1, SHAPES.query_heads, RANK, device, splits=1)
    values(scores, chosen, table, slots=32, columns=256)
    latents, _ = latent_values_plainly(scores[0], document, chosen.positions[0])
    assert samples.relative(values.latents[0, 0] / values.sums[0, 0, :, None], latents) < 1e-5


def test_scores_of_chunks_behind_2_31_elements_are_read(device: torch.device) -> None:
    """Of the last of 9 sessions, in a buffer for documents so long; these are short."""
    shapes, sessions, units = samples.Shapes(kv_heads=1, group=16), 9, 2**24 + 64
    document = samples.document(50, "float", torch.float32, device, shapes, chunk=4)
    tile = 64 if device.type == "cuda" else 2**15  # few programs to interpret; compiled it has no end
    scores = LandmarkScores(
        sessions, 4 * units, 1, shapes.group, shapes.dim, 4, torch.float32, 0.3, device, tile=tile
    )
    assert (sessions - 1) * shapes.group * units > 2**31
    query = samples.queries(sessions, torch.float32, device, shapes)
    others = torch.zeros(sessions, shapes.group, device=device)
    scores(query, others, DocumentTable([document] * sessions, [8] * sessions))
    expected = index_shares_plainly(query[-1], others[-1], document, 0.3)
    assert (scores.shares[-1, : len(expected)] - expected).abs().max() < 1e-4


def test_columns_behind_2_31_elements_are_rounded(device: torch.device) -> None:
    """Rows so far apart that the last begins there; they are read, and not the elements between them."""
    columns = torch.empty(2**31 + 2**20, device=device).as_strided((5, 70), (2**29, 1))
    columns.copy_(torch.randn(5, 70))
    scales = torch.rand(2, 70, device=device) + 0.1
    expected = squared_errors_plainly(columns, scales, 4)
    torch.testing.assert_close(squared_errors(columns, scales, 4), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(pack_odd(columns, scales[0], 4), pack(round_odd_plainly(columns, scales[0], 4), 4))
