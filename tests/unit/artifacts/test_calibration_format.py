"""The calibration file: it comes back bit for bit, and its id is that of all that it does."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from calibration_samples import FIGURES, GROUPS, calibration
from pydantic import ValidationError

from xkv_artifacts.calibration_format import (
    CalibrationManifest,
    identified,
    is_statistic,
    read_calibration,
    read_manifest,
    verify,
    write_calibration,
)
from xkv_artifacts.errors import CorruptArtifact, InvalidKey
from xkv_artifacts.header import MAX_HEADER_BYTES
from xkv_artifacts.keys import sample_sha256

Tensors = dict[str, torch.Tensor]


def written(manifest: CalibrationManifest, tensors: Tensors) -> tuple[CalibrationManifest, io.BytesIO]:
    file = io.BytesIO()
    return write_calibration(file, identified(manifest, tensors), tensors), file


def test_a_calibration_comes_back_as_it_was() -> None:
    manifest, tensors = calibration()
    made, file = written(manifest, tensors)
    assert made.model_copy(update={"id": manifest.id, "tensors": {}}) == manifest
    found, loaded = read_calibration(file)
    assert found == made == read_manifest(file) == verify(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert written(*calibration())[1].getvalue() == file.getvalue()


def test_the_method_takes_it() -> None:
    from xkv_service.calibration.calibration import Calibration

    made, file = written(*calibration())
    found, loaded = read_calibration(file)
    read = Calibration.from_tensors(found.groups, loaded, found.figures, found.id)
    assert read.id == made.id and [group.layers for group in read.groups] == list(GROUPS)
    assert read.figures == FIGURES
    assert all(torch.equal(read.to_tensors()[name], tensor) for name, tensor in loaded.items())


def test_statistics_make_it_version_2_and_are_read_when_asked_for() -> None:
    manifest, tensors = calibration()
    more = {**tensors, "statistics.counts": torch.tensor([5, 7])}
    made, file = written(manifest, more)
    assert (made.version, written(manifest, tensors)[0].version) == (2, 1)
    assert read_manifest(file) == verify(file) == made
    assert read_calibration(file)[1].keys() == tensors.keys()
    assert list(read_calibration(file, is_statistic)[1]) == ["statistics.counts"]
    assert read_calibration(file, lambda name: True)[1].keys() == more.keys()
    with pytest.raises(CorruptArtifact, match="manifest field version: 1, with statistics it is 2"):
        write_calibration(io.BytesIO(), made.model_copy(update={"version": 1}), more)


def test_a_damaged_statistic_is_found_by_who_reads_it_and_by_verify() -> None:
    manifest, tensors = calibration()
    made, file = written(manifest, {**tensors, "statistics.counts": torch.tensor([5, 7])})
    content = bytearray(file.getvalue())
    place = content.index(torch.tensor([5, 7]).numpy().tobytes())
    content[place] ^= 1
    damaged = io.BytesIO(content)
    assert read_calibration(damaged)[0].id == made.id
    for read in (verify, lambda file: read_calibration(file, is_statistic)):
        with pytest.raises(CorruptArtifact, match="statistics.counts: the checksum does not match"):
            read(damaged)


def changed(tensors: Tensors, name: str, tensor: torch.Tensor) -> Tensors:
    return {**tensors, name: tensor}


def test_the_id_is_that_of_everything_that_counts() -> None:
    manifest, tensors = calibration()
    others: list[tuple[CalibrationManifest, Tensors]] = [
        (manifest, tensors),
        calibration(fingerprint="e" * 64),
        calibration(settings={"group_size": 2, "ridge": 0.25}),
        calibration(documents=((*range(50), 0), tuple(range(1, 30)))),
        calibration(documents=(tuple(range(50)) + tuple(range(30)),)),
        (manifest.model_copy(update={"groups": ((0, 1), (3, 2))}), tensors),
        (manifest.model_copy(update={"groups": ((0, 1, 2, 3),)}), tensors),
        # The same bytes in another shape, of another type, under another name.
        (manifest, changed(tensors, "layer.0.planes", tensors["layer.0.planes"].reshape(2, 1, 2))),
        (manifest, changed(tensors, "layer.0.planes", tensors["layer.0.planes"].view(torch.int32))),
        (manifest, {name.replace("layer.3", "layer.4"): tensor for name, tensor in tensors.items()}),
    ]
    for name in tensors:
        flat = tensors[name].clone()
        flat.view(-1)[-1] += 1
        others.append((manifest, changed(tensors, name, flat)))
    assert len({identified(*other).id for other in others}) == len(others)


def test_what_does_not_count_leaves_the_id() -> None:
    manifest, tensors = calibration()
    first = identified(manifest, tensors).id
    for other in (
        manifest.model_copy(update={"figures": {}}),
        calibration(hours=3)[0],
        calibration(settings={"ridge": 0.5, "group_size": 2.0})[0],
    ):
        assert identified(other, tensors).id == first


def test_a_manifest_under_another_id_is_not_written() -> None:
    manifest, tensors = calibration()
    file = io.BytesIO()
    with pytest.raises(CorruptArtifact, match="is not that of this model"):
        write_calibration(file, manifest, tensors)
    with pytest.raises(CorruptArtifact, match="is not that of this model"):
        write_calibration(file, identified(manifest, tensors), calibration(seed=1)[1])
    assert file.getvalue() == b""


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"figures": {"error": float("nan")}}, "no number"),
        ({"settings": {"ridge": float("inf")}}, "no number"),
        ({"figures": {"x": "x" * MAX_HEADER_BYTES}}, "claims"),
        ({"groups": ((0, 1), (1, 2))}, "named twice"),
        ({"groups": ()}, "groups"),
    ],
)
def test_what_no_reader_would_take_is_not_written(update: dict[str, Any], reason: str) -> None:
    manifest, tensors = calibration()
    with pytest.raises(CorruptArtifact, match=reason):
        identified(manifest.model_copy(update=update), tensors)


def test_figures_and_settings_are_plain_json() -> None:
    fields = calibration()[0].model_dump()
    for name in ("figures", "settings"):
        with pytest.raises(ValidationError, match=name):
            CalibrationManifest.model_validate({**fields, name: {"x": torch.zeros(1)}})
        tuples = CalibrationManifest.model_validate({**fields, name: {"x": ({"y": (1, 2.5)}, "z")}})
        assert getattr(tuples, name) == {"x": [{"y": [1, 2.5]}, "z"]}
        assert read_manifest(written(tuples, calibration()[1])[1]) == written(tuples, calibration()[1])[0]


def test_a_sample_is_its_documents_in_order() -> None:
    samples: list[list[list[int]]] = [
        [[1, 2], [3]],
        [[1], [2, 3]],
        [[1, 2, 3]],
        [[3], [1, 2]],
        [[1, 2], [3], []],
    ]
    assert len({sample_sha256(sample) for sample in samples}) == len(samples)
    assert sample_sha256(iter([torch.tensor([1, 2]), [3]])) == sample_sha256(samples[0])
    with pytest.raises(InvalidKey):
        sample_sha256([[-1]])
