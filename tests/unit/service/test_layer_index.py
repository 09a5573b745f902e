"""The selection index of many layers at once, against one layer after the other."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from xkv_service.prefilling.prefill import prefill
from xkv_service.selection.layer_index import index_layers
from xkv_service.selection.sketch import candidate_planes, choose_planes, encode
from xkv_service.spec import CompressionSpec
from xkv_service.stored import sketch_planes

SPEC = CompressionSpec(sketch_planes=3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_each_layers_sketch_is_that_of_the_layer_alone(family: str) -> None:
    exact = prefill(tiny_model(family), torch.arange(3, 83))
    layers = exact.layout.compressible
    energy = {layer.index: exact.keys(layer.index).square().mean(0) for layer in layers}
    sketches = index_layers(exact, SPEC, energy).sketches
    assert sorted(sketches) == [layer.index for layer in layers]
    for layer in layers:
        number = layer.index
        candidates = candidate_planes(exact.planes(number), layer.head_dim)
        count = sketch_planes(SPEC, layer.head_dim)
        planes = choose_planes(energy[number], exact.query_energy(number), candidates, count)
        codes, scales = encode(exact.rotated_keys(number), planes)
        found = sketches[number]
        assert torch.equal(found.planes, planes)
        assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales)
