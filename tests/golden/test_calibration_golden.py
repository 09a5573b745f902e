"""Calibrations of every format version that was ever released are read bit for bit by today's code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import independent_reader
import pytest
import torch
from make_calibration_golden import GOLDEN

from xkv_artifacts.calibration_format import read_calibration, verify, write_calibration
from xkv_service.calibration.storage import read_calibration_file

SHA256 = {
    "calibration-v1.safetensors": "5e3aa90f291f215e89d449b20cce355f0f93976d66fa39e26f05e7f391974a7e",
    "calibration-v2.safetensors": "4072f82f6c03989225691ce7334782e38113d2b448e49029cc7b9b9d6408ea77",
    "calibration-v1-shared.safetensors": "4dd1b8d8ce8aaeb5236b341608c7ea5a934f274c4cdee25290f4fb7b0dc13ade",
}


def path_of(name: str) -> Path:
    return Path(__file__).with_name(name)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_calibration_is_the_one_of_the_day_it_was_made(name: str) -> None:
    assert hashlib.sha256(path_of(name).read_bytes()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_written_today_is_what_was_written_then(name: str) -> None:
    manifest, tensors = GOLDEN[name]
    blob = io.BytesIO()
    write_calibration(blob, manifest(), tensors())
    assert blob.getvalue() == path_of(name).read_bytes()


@pytest.mark.parametrize("name", GOLDEN)
def test_every_version_is_read_bit_for_bit(name: str) -> None:
    with path_of(name).open("rb") as file:
        manifest, tensors = read_calibration(file, lambda name: True)
        assert verify(file) == manifest and manifest.version == (2 if "v2" in name else 1)
    expected_manifest, expected_tensors = GOLDEN[name]
    expected = expected_tensors()
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor), key
    assert manifest.model_copy(update={"tensors": {}}) == expected_manifest()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_reader_made_from_the_document_reads_the_same(name: str) -> None:
    manifest, tensors = independent_reader.read_calibration(path_of(name).read_bytes())
    assert manifest["settings"]["text"] == "Größe" and manifest["figures"]["note"] == "漢字 🙂"
    for key, tensor in GOLDEN[name][1]().items():
        _, shape, data = tensors[key]
        assert shape == list(tensor.shape) and data == tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_method_takes_it(name: str) -> None:
    read = read_calibration_file(path_of(name))
    assert tuple(group.layers for group in read.groups) == GOLDEN[name][0]().groups
    assert [group.keys.bases.shape[0] for group in read.groups] == [5, 5]
