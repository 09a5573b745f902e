"""Sessions of every format version that was ever released are read bit for bit by today's code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import independent_reader
import torch
from make_session_golden import DOCUMENT, golden_session_manifest, golden_session_tensors

from xkv_artifacts.session_format import load_session

GOLDEN = Path(__file__).with_name("session-v1.xkv")
GOLDEN_SHA256 = "aac21a50746aa0217319112a59e2b507e9a6afa8f277c93281942d3211ff3ce3"


def test_the_golden_session_is_the_one_of_the_day_it_was_made() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_SHA256


def test_version_1_is_read_bit_for_bit() -> None:
    manifest, tensors = load_session(GOLDEN)
    expected = golden_session_tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert manifest.model_copy(update={"tensors": {}}) == golden_session_manifest()


def test_a_reader_made_from_the_document_reads_the_same() -> None:
    manifest, tensors = independent_reader.read_session(GOLDEN.read_bytes())
    assert manifest["messages"][1] == {"role": "assistant", "content": "漢 🙂\n"}
    assert tensors["document"][2].decode() == DOCUMENT
    for name, tensor in golden_session_tensors().items():
        _, shape, data = tensors[name]
        assert shape == list(tensor.shape) and data == tensor.flatten().view(torch.uint8).numpy().tobytes()
