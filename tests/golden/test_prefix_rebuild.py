"""Golden prefixes say the same numbers to today's code and to a reader made from docs/format.md."""

from __future__ import annotations

from pathlib import Path

import independent_reader
import pytest
import torch
from independent_rebuild import Prefix
from make_prefix_golden import GOLDEN

from xkv_artifacts.format import read_prefix
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.decoding.derived_index import derived_sketches
from xkv_service.decoding.layer_prefix import LayerPrefix, Turns
from xkv_service.decoding.scoring import SketchScorer
from xkv_service.errors import InvalidSpec
from xkv_service.factors import PrefixFactors
from xkv_service.reconstruct import rebuild
from xkv_service.selection.sketch import KeySketch

FOLDER = Path(__file__).parent
CALIBRATION = FOLDER / "calibration-v1-shared.safetensors"


def loaded(name: str) -> PrefixFactors:
    with (FOLDER / name).open("rb") as file:
        return PrefixFactors.from_tensors(*read_prefix(file), read_calibration_file(CALIBRATION))


def read_independently(name: str) -> Prefix:
    calibration = independent_reader.read_calibration(CALIBRATION.read_bytes())
    return Prefix(independent_reader.read((FOLDER / name).read_bytes()), calibration)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_code_loads_it_would_store_as_it_was(name: str) -> None:
    stored, expected = loaded(name).to_tensors(), GOLDEN[name][1]()
    assert stored.keys() == expected.keys()
    for key, tensor in expected.items():
        assert stored[key].dtype == tensor.dtype and torch.equal(stored[key], tensor), key


@pytest.mark.parametrize("name", GOLDEN)
def test_both_rebuild_the_same_keys_and_values(name: str) -> None:
    """Every product and sum of golden numbers is exact in float32."""
    factors, independent = loaded(name), read_independently(name)
    for layer in factors.layers:
        keys, values = rebuild(factors, layer)
        assert keys.flatten(1).tolist() == independent.keys(layer)
        if layer not in factors.rope_keys:
            assert values.flatten(1).tolist() == independent.values(layer)


@pytest.mark.parametrize("name", GOLDEN)
def test_both_turn_keys_alike(name: str) -> None:
    """Up to the last bits of cos, sin and two products."""
    factors, independent = loaded(name), read_independently(name)
    for layer in factors.layers:
        group, place = factors.locate(layer)
        table = factors.rotary[group.layout.rotary[place]]
        turned = table.rotate(rebuild(factors, layer)[0], torch.arange(factors.tokens)).flatten(1)
        expected = torch.tensor(independent.turned(independent.keys(layer), layer))
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_both_derive_the_same_sketch(layer: int) -> None:
    name = "prefix-v1-packed.safetensors"
    factors, cpu = loaded(name), torch.device("cpu")
    group, place = factors.locate(layer)
    turns = Turns(factors.rotary[group.layout.rotary[place]], factors.tokens, cpu)
    prefix = LayerPrefix(factors, layer, turns, cpu, torch.float32)
    derived = derived_sketches(group.keys.factors, [prefix], factors.planes)[layer]
    codes, scales = read_independently(name).derived_sketch(layer)
    shape = factors.tokens, prefix.kv_heads
    sketch = KeySketch(
        factors.planes[layer],
        torch.tensor(codes, dtype=torch.uint8).reshape(*shape, -1),
        torch.tensor(scales, dtype=torch.float16).reshape(shape),
    )
    queries = torch.eye(prefix.head_dim).expand(prefix.kv_heads, -1, -1)
    assert torch.equal(SketchScorer(derived)(queries), SketchScorer(sketch)(queries))


def test_shared_bases_need_the_calibration_of_that_id() -> None:
    name = "prefix-v1-shared.safetensors"
    with (FOLDER / name).open("rb") as file, pytest.raises(InvalidSpec, match="was not given"):
        PrefixFactors.from_tensors(*read_prefix(file))
    manifest, tensors = independent_reader.read_calibration(CALIBRATION.read_bytes())
    other = manifest | {"id": "0" * 64}, tensors
    with pytest.raises(AssertionError):
        Prefix(independent_reader.read((FOLDER / name).read_bytes()), other)
