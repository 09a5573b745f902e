"""The kernels read a prefix as artifacts hold it, and attend as decoding does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kernel_samples as samples
import pytest
import torch
from compressed import random_ids
from families import tiny_model

from xkv_service import CompressionSpec, SelectionSpec, compress
from xkv_service.decoding.attend import attend
from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.scoring import Scoring
from xkv_service.decoding.select import Selection
from xkv_service.kernels.decode_attention import DecodeAttention, Tiles
from xkv_service.kernels.document_table import DocumentLayer, DocumentTable
from xkv_service.kernels.factor_rows import FactorRows
from xkv_service.kernels.tail_table import TailRow, TailTable

SCALING, TAIL, BUDGET, LAYER = 0.3, 6, 24, 1
TILES = Tiles(
    index={"tile": 64},
    choose={"block": 64},
    scores={"slots": 32},
    values={"slots": 32, "columns": 64},
    splits=1,
)


SKETCH = {"index": "sketch"}
LANDMARKS = [
    {"index": "landmark", "landmark_chunk": 4, "outlier_chunks": 2},
    {"index": "landmark", "landmark_chunk": 8},
    {"index": "landmark", "landmark_chunk": 16},
]
"""Outlier chunks are exact: chosen, they are paid for. Of 120 tokens the last 8 are no whole chunk of 16."""


@pytest.mark.parametrize(
    ("dtype", "index", "tokens"),
    [
        ("int8", SKETCH, 120),
        ("bfloat16", SKETCH, 120),
        *(("int8", one, 120) for one in LANDMARKS),
        *(("bfloat16", one, 93) for one in LANDMARKS),  # of the last chunk only the first tokens
    ],
)
def test_attention_over_an_artifact_is_decodings(
    dtype: str, index: dict[str, Any], tokens: int, device: torch.device
) -> None:
    model = tiny_model("llama", head_dim=32).to(device)
    spec = CompressionSpec(ratio=2.0, group_size=3, factor_dtype=dtype, **index)
    factors = compress(model, random_ids(120), spec)
    layer = Prefix.of(model, factors, tokens).layers[LAYER]
    assert isinstance(layer, LayerPrefix)
    selection = Selection(layer, SelectionSpec(index["index"], BUDGET, recent=8))
    rows = [FactorRows.of(one) for one in layer.token_factors]
    document = DocumentLayer.of(layer, rows[0], rows[1], selection.always)
    table = DocumentTable([document], [selection.budget])
    turns = layer.turns.cos.contiguous(), layer.turns.sin.contiguous()
    tiles = replace(TILES, index={"tile": 64 if index == SKETCH else 16})
    kernels = DecodeAttention(table, 4, 32, 32, tokens, tokens, turns, SCALING, tiles=tiles)

    torch.manual_seed(0)
    query = 3 * torch.randn(1, 4, 1, 32, device=device)
    keys, values = (torch.randn(1, 2, TAIL, 32, device=device) for _ in range(2))
    expected, rebuilt = attend(query, keys, values, None, selection, Scoring(SCALING))
    tails = TailTable([TailRow((layer.exact_keys, layer.exact_values), (keys[0], values[0]))], device)
    lengths = torch.tensor([TAIL], dtype=torch.int32, device=device)
    out = torch.full((1, 4, 32), torch.nan, device=device)
    kernels(query[:, :, 0].contiguous(), tails, lengths, table, out)
    assert int(kernels.chosen.counts) == rebuilt
    # float32 throughout; of a sketch one token of equal share may be exchanged for another.
    assert samples.relative(out, expected[:, 0]) < 1e-3
