"""What is reserved for a prefix before it is loaded is what it holds then, for every kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed import manifest_of, random_ids
from families import FAMILIES, tiny_model
from measured import calibrated
from transformers import PreTrainedModel

from xkv_service import CompressionSpec, compress
from xkv_service.decoding.prefix import Prefix
from xkv_service.engine.footprint import calibration_bytes, prefix_bytes
from xkv_service.engine.storages import held_bytes
from xkv_service.factors import PrefixFactors
from xkv_service.stored import artifact_bytes

TOKENS = 120
CPU = torch.device("cpu")


def _held_and_promised(model: PreTrainedModel, factors: PrefixFactors) -> tuple[int, int]:
    manifest = manifest_of(factors)
    # Names are all that the manifest in a file says of tensors.
    named = manifest.model_copy(update={"tensors": dict.fromkeys(factors.to_tensors(), "0" * 64)})
    prefix = Prefix.of(model, PrefixFactors.from_tensors(named, factors.to_tensors()))
    return held_bytes(prefix, device=CPU), prefix_bytes(model, named, factors.spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_holds_more_than_was_promised(family: str) -> None:
    model = tiny_model(family)
    spec = CompressionSpec(group_size=2, rank_k=16, rank_v=16)
    held, promised = _held_and_promised(model, compress(model, random_ids(TOKENS), spec))
    assert 0.4 * promised < held <= promised


@pytest.mark.parametrize(
    "fields",
    [
        {"index": "sketch"},
        {"index": "landmark", "outlier_chunks": 2},
        {"factor_dtype": "float32", "dtype": "float32"},
        {"factor_dtype": "bfloat16", "group_size": 1, "recent": 8},
    ],
)
def test_nor_does_any_way_to_store_it(fields: dict[str, Any]) -> None:
    model = tiny_model("llama")
    spec = CompressionSpec(**{"group_size": 3, "rank_k": 24, "rank_v": 32, **fields})
    ids = random_ids(500)
    held, promised = _held_and_promised(model, compress(model, ids, spec))
    assert 0.85 * promised < held <= promised


def test_with_a_calibration_too() -> None:
    model = tiny_model("llama", num_key_value_heads=4)
    calibration = calibrated(model)
    spec = CompressionSpec(
        calibration=calibration.id, ratio=2.0, basis="calibrated", factor_dtype="mixed", index="derived"
    )
    factors = compress(model, random_ids(500), spec, calibration)
    named = manifest_of(factors).model_copy(update={"tensors": dict.fromkeys(factors.to_tensors(), "0" * 64)})
    prefix = Prefix.of(model, PrefixFactors.from_tensors(named, factors.to_tensors(), calibration))
    held = held_bytes(prefix, device=CPU, besides=calibration)
    promised = prefix_bytes(model, named, factors.spec)
    assert 0.8 * promised < held <= promised
    assert held_bytes(prefix, device=CPU) > held  # the bases are the calibration's own memory
    assert calibration_bytes(model, calibration) == held_bytes(calibration, device=CPU)


def test_what_is_read_is_what_the_file_has() -> None:
    model = tiny_model("llama")
    factors = compress(model, random_ids(TOKENS), CompressionSpec(group_size=3, rank_k=24, rank_v=32))
    tensors = factors.to_tensors()
    stored = sum(one.nbytes for name, one in tensors.items() if not name.startswith("rotary."))
    assert artifact_bytes(manifest_of(factors), factors.spec) == stored


def test_shorter_prefixes_and_layers_hold_nothing_twice() -> None:
    model = tiny_model("llama")
    factors = compress(model, random_ids(500), CompressionSpec(group_size=3, rank_k=24, rank_v=32))
    whole = Prefix.of(model, factors)
    alone = held_bytes(whole, device=CPU)
    shorter = [Prefix.of(model, factors, tokens) for tokens in (10, 100, 499)]
    assert held_bytes(whole, *shorter, device=CPU) == alone
    positions = {layer.positions.data_ptr() for layer in whole.layers.values()}
    assert len(positions) == 1
