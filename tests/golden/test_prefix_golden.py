"""Files of every format version that was ever released are read bit for bit by today's code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import independent_reader
import pytest
import torch
from make_prefix_golden import GOLDEN

from xkv_artifacts.format import read_prefix, verify, write_prefix

SHA256 = {
    "prefix-v1.safetensors": "b8b3e5883d59a1d88b3583aefe18d1da091883ea8693852caf3b45d804ca4d18",
    "prefix-v1-latent.safetensors": "91c49c00c0c2ac0221fbcc18db77f990b6085c8dc47ca3c9f449056c46c5fd81",
    "prefix-v1-packed.safetensors": "a2cca20e91304d8ec83c2ab75e1ea6145203daa93a22af94ed2364a259aa26f9",
    "prefix-v1-shared.safetensors": "203d9363cd421020ed8af98e1bd02111610383dff266b7d7f86bbbc97a4bdf02",
    "prefix-v1-integers.safetensors": "87a7cce6a3365ebb4dc2838fc1e5aceececa0dac74a455490b890d8d8f52e9bc",
}


def path_of(name: str) -> Path:
    return Path(__file__).with_name(name)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_is_the_one_of_the_day_it_was_made(name: str) -> None:
    assert hashlib.sha256(path_of(name).read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_written_today_is_what_was_written_then(name: str) -> None:
    manifest, tensors = GOLDEN[name]
    blob = io.BytesIO()
    write_prefix(blob, manifest(), tensors())
    assert blob.getvalue() == path_of(name).read_bytes()


@pytest.mark.parametrize("name", GOLDEN)
def test_version_1_is_read_bit_for_bit(name: str) -> None:
    with path_of(name).open("rb") as file:
        manifest, tensors = read_prefix(file)
        assert verify(file) == manifest
    expected = GOLDEN[name][1]()
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype and tensors[key].shape == tensor.shape
        assert torch.equal(tensors[key], tensor), key
    assert manifest.model_copy(update={"tensors": {}}) == GOLDEN[name][0]()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_reader_made_from_the_document_reads_the_same(name: str) -> None:
    manifest, tensors = independent_reader.read(path_of(name).read_bytes())
    expected_manifest, expected_tensors = GOLDEN[name]
    assert manifest["id"] == expected_manifest().id
    for tensor_name, tensor in expected_tensors().items():
        dtype, shape, data = tensors[tensor_name]
        assert shape == list(tensor.shape)
        assert data == tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else data == b""


def test_the_method_takes_it() -> None:
    from xkv_service.factors import PrefixFactors

    with path_of("prefix-v1.safetensors").open("rb") as file:
        factors = PrefixFactors.from_tensors(*read_prefix(file))
    assert (factors.tokens, factors.layers, list(factors.windows)) == (130, (0, 1), [2])
    with path_of("prefix-v1-latent.safetensors").open("rb") as file:
        factors = PrefixFactors.from_tensors(*read_prefix(file))
    assert (factors.layers, list(factors.rope_keys), list(factors.states)) == ((0, 2), [0, 2], [1])
