"""Scores of landmarks and the choice of their chunks, held against PyTorch."""

from __future__ import annotations

from dataclasses import replace

import kernel_samples as samples
import pytest
import torch

from xkv_service.kernels.choose_tokens import ChooseTokens
from xkv_service.kernels.decode_plainly import choose_plainly, index_shares_plainly
from xkv_service.kernels.document_table import ALWAYS, CHOOSABLE, CLOSED, DocumentLayer, DocumentTable
from xkv_service.kernels.landmark_scores import LandmarkScores
from xkv_service.selection.landmarks import Landmarks

# Nothing is rounded, but for sums in float32. Shares here reach -30.
TOLERANCE = 1e-4
BINS = 128


def scored(
    documents: list[DocumentLayer], budgets: list[int], query: torch.Tensor, others: torch.Tensor,
    shapes: samples.Shapes = samples.SMALL, tile: int = 16,
) -> tuple[LandmarkScores, DocumentTable]:  # fmt: skip
    table, layout = DocumentTable(documents, budgets), documents[0].index_layout
    assert layout.landmarks is not None
    index = LandmarkScores(
        query.shape[0], max(one.tokens for one in documents), shapes.kv_heads, shapes.group, shapes.dim,
        layout.unit, layout.landmarks, 0.3, query.device, tile=tile,
    )  # fmt: skip
    index.shares.fill_(torch.nan)
    index(query, others, table)
    return index, table


@pytest.mark.parametrize("chunk", [1, 4, 8, 16])
@pytest.mark.parametrize(
    "shapes",
    [samples.SMALL, samples.Shapes(kv_heads=3, group=2), samples.Shapes(kv_heads=1, group=6, dim=64)],
)
@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_shares_are_those_of_the_landmarks(
    chunk: int, shapes: samples.Shapes, dtype: torch.dtype, asked: torch.dtype, device: torch.device
) -> None:
    """Of documents of different lengths, whose last chunks are short; queries may have another dtype."""
    documents = [
        samples.document(tokens, "float", dtype, device, shapes, tokens, chunk=chunk) for tokens in (69, 201)
    ]
    query = samples.queries(3, asked, device, shapes)
    others = torch.randn(3, shapes.query_heads, device=device)
    of_sessions = [documents[0], documents[1], documents[1]]
    index, _ = scored(of_sessions, [16, 16, 16], query, others, shapes)
    for session, document in enumerate(of_sessions):
        expected = index_shares_plainly(query[session], others[session], document, 0.3)
        assert len(expected) == -(-document.tokens // chunk)
        assert (index.shares[session, : len(expected)] - expected).abs().max() < TOLERANCE


def test_sums_over_many_tiles_are_those_of_all_chunks(device: torch.device) -> None:
    """Sums of 64 tiles are read at once. One KV head has its largest scores there, the other behind them."""
    first = 64 * 16
    document = samples.document(4 * first + 1109, "float", torch.float32, device, chunk=4)
    assert isinstance(document.index, Landmarks)
    document.index.means[first:, 0] /= 2
    document.index.means[:first, 1] /= 2
    short = samples.document(70, "float", torch.float32, device, seed=1, chunk=4)
    query = samples.queries(2, torch.float32, device)
    others = torch.randn(2, samples.SMALL.query_heads, device=device)
    index, _ = scored([document, short], [8, 8], query, others)
    for session, one in enumerate((document, short)):
        expected = index_shares_plainly(query[session], others[session], one, 0.3)
        assert (index.shares[session, : len(expected)] - expected).abs().max() < TOLERANCE


def test_a_part_of_a_document_is_scored_alone(device: torch.device) -> None:
    """As a table's `lengths` say; the last mean is that of its whole chunk."""
    whole = samples.document(120, "float", torch.float32, device, chunk=8)
    assert isinstance(whole.index, Landmarks)
    query, others = samples.queries(1, torch.float32, device), torch.zeros(1, 8, device=device)
    index, table = scored([whole], [16], query, others)
    table.overwrite([whole], [16], [43])
    index.shares.fill_(torch.nan)
    index(query, others, table)
    part = replace(whole, index=Landmarks(whole.index.means[:6], 8))
    expected = index_shares_plainly(query[0], others[0], part, 0.3)
    assert (index.shares[0, :6] - expected).abs().max() < TOLERANCE
    assert index.shares[0, 6:].isnan().all()


@pytest.mark.parametrize("chunk", [4, 8, 16, 5])
@pytest.mark.parametrize("units", [[2, 5], [1, 1000]])
def test_the_best_chunks_are_chosen(chunk: int, units: list[int], device: torch.device) -> None:
    """Blocks of 32 tokens do not end where chunks of 5 do."""
    documents = [
        samples.document(tokens, "float", torch.float32, device, seed=tokens, chunk=chunk)
        for tokens in (183, 200)
    ]
    budgets = [chunk * count for count in units]
    query, others = samples.queries(2, torch.float32, device), torch.zeros(2, 8, device=device)
    index, table = scored(documents, budgets, query, others)
    chosen = ChooseTokens(2, 200, 200, device, bins=BINS, block=32)
    for _ in range(2):  # the second time with the histogram that the first one left
        chosen.positions.fill_(-1)
        chosen(index.shares, table)
        for number, (document, budget) in enumerate(zip(documents, budgets, strict=True)):
            shares = index.shares[number, : -(-document.tokens // chunk)]
            positions = choose_plainly(shares, document.states, budget, BINS, chunk)
            assert int(chosen.counts[number]) == len(positions)
            assert torch.equal(chosen.positions[number, : len(positions)], positions)


@pytest.mark.parametrize(
    ("shares", "units", "expected"),
    [
        # the first chunk is exact: it is paid for, and none of its tokens listed
        ([-1, -3, -2, -4, -9], 2, [*range(8, 12), 16, 17]),
        # half of the second is exact
        ([-9, -1, -2, -4, -9], 1, [6, 7, 16, 17]),
        # the last, short and rebuilt always, is paid for as any other
        ([-9, -4, -2, -3, -1], 2, [*range(8, 12), 16, 17]),
        # in one bin what may be chosen comes first
        ([-2, -3, -2, -4, -2], 1, [*range(8, 12), 16, 17]),
    ],
)
def test_a_chunk_is_paid_for_whole(
    shares: list[float], units: int, expected: list[int], device: torch.device
) -> None:
    document = samples.document(18, "float", torch.float32, device, chunk=4)
    document.states.fill_(CHOOSABLE)
    document.states[:6], document.states[16:] = CLOSED, ALWAYS
    table = DocumentTable([document], [4 * units])
    chosen = ChooseTokens(1, 18, 18, device, bins=BINS, block=16)
    given = torch.tensor([shares], dtype=torch.float32, device=device)
    chosen(given, table)
    assert chosen.positions[0, : int(chosen.counts[0])].tolist() == expected
    plainly = choose_plainly(given[0], document.states, 4 * units, BINS, 4)
    assert plainly.tolist() == expected
