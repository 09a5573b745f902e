"""Scores of the packed index and the choice of tokens, held against PyTorch."""

from __future__ import annotations

import kernel_samples as samples
import pytest
import torch

from xkv_service.kernels.choose_tokens import ChooseTokens
from xkv_service.kernels.decode_plainly import choose_plainly, index_shares_plainly
from xkv_service.kernels.document_table import DocumentLayer, DocumentTable
from xkv_service.kernels.share_bins import LOWEST, RANGE
from xkv_service.kernels.sketch_scores import SketchScores

# Queries are rounded to half precision: 2^-11 of each product, a few of which add up. Shares here reach -30.
TOLERANCE = 0.02
BINS = 128


def scored(
    documents: list[DocumentLayer], budgets: list[int], query: torch.Tensor, others: torch.Tensor,
    shapes: samples.Shapes = samples.SMALL, together: int = 4, tile: int = 32, tiles: int = 2,
) -> tuple[SketchScores, DocumentTable]:  # fmt: skip
    table = DocumentTable(documents, budgets)
    index = SketchScores(
        query.shape[0], max(one.tokens for one in documents), shapes.kv_heads, shapes.group, shapes.dim,
        shapes.planes, 0.3, query.device, tile=tile, tiles=tiles, together=together,
    )  # fmt: skip
    index.shares.fill_(torch.nan)
    index(query, others, table)
    return index, table


@pytest.mark.parametrize(
    ("shapes", "together"),
    [
        (samples.SMALL, 4),
        (samples.Shapes(kv_heads=3, group=2), 2),  # the last product has one KV head only
        (samples.Shapes(kv_heads=1, group=6, planes=6), 1),  # nothing is a power of 2
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_are_those_of_the_sketch(
    shapes: samples.Shapes, together: int, dtype: torch.dtype, device: torch.device
) -> None:
    documents = [samples.document(tokens, "float", dtype, device, shapes, tokens) for tokens in (70, 200)]
    query, others = (
        samples.queries(3, dtype, device, shapes),
        torch.randn(3, shapes.query_heads, device=device),
    )
    of_sessions = [documents[0], documents[1], documents[1]]
    index, _ = scored(of_sessions, [8, 8, 8], query, others, shapes, together)
    for session, document in enumerate(of_sessions):
        expected = index_shares_plainly(query[session], others[session], document, 0.3)
        assert (index.shares[session, : document.tokens] - expected).abs().max() < TOLERANCE


def test_sums_over_many_blocks_are_those_of_all_tokens(device: torch.device) -> None:
    """Sums of 64 blocks are read at once: 1,024 tokens here, 32,768 with the tiles that the kernels choose.

    One KV head has its largest scores in the first 64 blocks, the other behind them.
    """
    first = 64 * 16
    document = samples.document(first + 277, "float", torch.float32, device)
    document.index.scales[first:, 0] /= 2
    document.index.scales[:first, 1] /= 2
    short = samples.document(70, "float", torch.float32, device, seed=1)
    query = samples.queries(2, torch.float32, device)
    others = torch.randn(2, samples.SMALL.query_heads, device=device)
    index, _ = scored([document, short], [8, 8], query, others, tile=16, tiles=1)
    for session, one in enumerate((document, short)):
        expected = index_shares_plainly(query[session], others[session], one, 0.3)
        assert (index.shares[session, : one.tokens] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", [2.0**17, 2.0**-16])
def test_queries_of_any_size_keep_their_shares(size: float, device: torch.device) -> None:
    """Half precision ends at 65,504, and has fewer digits below 2^-14: queries are divided by their largest
    number first. Where they are large, the sketch is small, so that shares are not extreme.
    """
    document = samples.document(100, "float", torch.float32, device)
    document.index.scales.copy_(document.index.scales.float() / size)
    query = size * samples.queries(1, torch.float32, device)
    query[:, 1] = 0
    others = torch.zeros(1, samples.SMALL.query_heads, device=device)
    index, _ = scored([document], [8], query, others)
    expected = index_shares_plainly(query[0], others[0], document, 0.3)
    assert (index.shares[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("budgets", [[16, 40], [1, 1000]])
def test_the_best_tokens_are_chosen(budgets: list[int], device: torch.device) -> None:
    documents = [
        samples.document(tokens, "float", torch.float32, device, seed=tokens) for tokens in (90, 100)
    ]
    query, others = samples.queries(2, torch.float32, device), torch.zeros(2, 8, device=device)
    index, table = scored(documents, budgets, query, others)
    chosen = ChooseTokens(2, 100, 100, device, bins=BINS, block=32)
    for _ in range(2):  # the second time with the histogram that the first one left
        chosen.positions.fill_(-1)
        chosen(index.shares, table)
        for number, (document, budget) in enumerate(zip(documents, budgets, strict=True)):
            shares = index.shares[number, : document.tokens]
            positions = choose_plainly(shares, document.states, budget, BINS)
            assert int(chosen.counts[number]) == len(positions)
            assert torch.equal(chosen.positions[number, : len(positions)], positions)


def test_a_choice_is_the_best_up_to_the_width_of_a_bin(device: torch.device) -> None:
    document = samples.document(333, "float", torch.float32, device)
    query, others = samples.queries(1, torch.float32, device), torch.zeros(1, 8, device=device)
    index, table = scored([document], [40], query, others)
    chosen = ChooseTokens(1, 333, 333, device, bins=BINS, block=64)
    chosen(index.shares, table)
    shares = index.shares[0].clamp_min(LOWEST)
    taken = torch.zeros(333, dtype=torch.bool, device=device)
    taken[chosen.positions[0, : int(chosen.counts[0])].long()] = True
    open_ = document.states == 1
    assert int((taken & open_).sum()) == 40
    assert shares[taken & open_].min() >= shares[~taken & open_].max() - RANGE / BINS


def test_equal_shares_still_fill_the_budget(device: torch.device) -> None:
    document = samples.document(200, "float", torch.float32, device)
    query, others = torch.zeros(1, 8, 32, device=device), torch.zeros(1, 8, device=device)
    index, table = scored([document], [50], query, others)
    chosen = ChooseTokens(1, 200, 200, device, bins=BINS, block=64)
    chosen(index.shares, table)
    expected = [*range(4, 54), 197, 198, 199]
    assert chosen.positions[0, : int(chosen.counts[0])].tolist() == expected
