"""Calibrations of every format version that was ever released are read bit for bit by today's code."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import independent_reader
import torch
from make_calibration_golden import GROUPS, golden_calibration_manifest, golden_calibration_tensors

from xkv_artifacts.calibration_format import read_calibration, verify, write_calibration

GOLDEN = Path(__file__).with_name("calibration-v1.safetensors")
GOLDEN_SHA256 = "5e3aa90f291f215e89d449b20cce355f0f93976d66fa39e26f05e7f391974a7e"


def test_the_golden_calibration_is_the_one_of_the_day_it_was_made() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_SHA256


def test_what_is_written_today_is_what_was_written_then() -> None:
    blob = io.BytesIO()
    write_calibration(blob, golden_calibration_manifest(), golden_calibration_tensors())
    assert blob.getvalue() == GOLDEN.read_bytes()


def test_version_1_is_read_bit_for_bit() -> None:
    with GOLDEN.open("rb") as file:
        manifest, tensors = read_calibration(file)
        assert verify(file) == manifest
    expected = golden_calibration_tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert manifest.model_copy(update={"tensors": {}}) == golden_calibration_manifest()


def test_a_reader_made_from_the_document_reads_the_same() -> None:
    manifest, tensors = independent_reader.read_calibration(GOLDEN.read_bytes())
    assert manifest["settings"]["text"] == "Größe" and manifest["figures"]["note"] == "漢字 🙂"
    for name, tensor in golden_calibration_tensors().items():
        _, shape, data = tensors[name]
        assert shape == list(tensor.shape) and data == tensor.flatten().view(torch.uint8).numpy().tobytes()


def test_the_method_takes_it() -> None:
    from xkv_service.calibration.calibration import Calibration

    with GOLDEN.open("rb") as file:
        manifest, tensors = read_calibration(file)
    read = Calibration.from_tensors(manifest.groups, tensors, manifest.figures, manifest.id)
    assert tuple(group.layers for group in read.groups) == GROUPS
    assert [group.keys.bases.shape[0] for group in read.groups] == [5, 5]
