"""Files of every format version that was ever released are read bit for bit by today's code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import independent_reader
import torch
from make_prefix_golden import golden_manifest, golden_tensors

from xkv_artifacts.format import read_prefix, verify

GOLDEN = Path(__file__).with_name("prefix-v1.safetensors")
GOLDEN_SHA256 = "b8b3e5883d59a1d88b3583aefe18d1da091883ea8693852caf3b45d804ca4d18"


def test_the_golden_file_is_the_one_of_the_day_it_was_made() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_SHA256


def test_version_1_is_read_bit_for_bit() -> None:
    with GOLDEN.open("rb") as file:
        manifest, tensors = read_prefix(file)
        assert verify(file) == manifest
    expected = golden_tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor), name
    assert manifest.model_copy(update={"tensors": {}}) == golden_manifest()


def test_a_reader_made_from_the_document_reads_the_same() -> None:
    manifest, tensors = independent_reader.read(GOLDEN.read_bytes())
    assert manifest["id"] == golden_manifest().id
    for name, tensor in golden_tensors().items():
        dtype, shape, data = tensors[name]
        assert shape == list(tensor.shape)
        assert data == tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else data == b""


def test_the_method_takes_it() -> None:
    from xkv_service.factors import PrefixFactors

    with GOLDEN.open("rb") as file:
        factors = PrefixFactors.from_tensors(*read_prefix(file))
    assert (factors.tokens, factors.layers, list(factors.windows)) == (130, (0, 1), [2])
