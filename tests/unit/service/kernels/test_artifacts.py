"""The kernels read a prefix as artifacts hold it, and attend as decoding does."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_attention_over_an_artifact_is_decodings(dtype: str, device: torch.device) -> None:
    model = tiny_model("llama", head_dim=32).to(device)
    factors = compress(model, random_ids(120), CompressionSpec(ratio=2.0, group_size=3, factor_dtype=dtype))
    layer = Prefix.of(model, factors).layers[LAYER]
    assert isinstance(layer, LayerPrefix)
    selection = Selection(layer, SelectionSpec("sketch", BUDGET, recent=8))
    group, _ = factors.locate(LAYER)
    assert group.values is not None
    rows = [FactorRows.of(pair.factors.to(device)) for pair in (group.keys, group.values)]
    document = DocumentLayer.of(layer, rows[0], rows[1], selection.always)
    table = DocumentTable([document], [BUDGET])
    turns = layer.turns.cos.contiguous(), layer.turns.sin.contiguous()
    kernels = DecodeAttention(table, 4, 32, 32, 120, 120, turns, SCALING, tiles=TILES)

    torch.manual_seed(0)
    query = 3 * torch.randn(1, 4, 1, 32, device=device)
    keys, values = (torch.randn(1, 2, TAIL, 32, device=device) for _ in range(2))
    expected, rebuilt = attend(query, keys, values, None, selection, Scoring(SCALING))
    tails = TailTable([TailRow((layer.exact_keys, layer.exact_values), (keys[0], values[0]))], device)
    lengths = torch.tensor([TAIL], dtype=torch.int32, device=device)
    out = torch.full((1, 4, 32), torch.nan, device=device)
    kernels(query[:, :, 0].contiguous(), tails, lengths, table, out)
    assert int(kernels.chosen.counts) == rebuilt
    # float32 throughout; one token of equal share may be exchanged for another.
    assert samples.relative(out, expected[:, 0]) < 1e-3
