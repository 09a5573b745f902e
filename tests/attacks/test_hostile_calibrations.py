"""Calibrations made to mislead a reader: refused as corrupt with the reason, and never anything else."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from calibration_samples import calibration
from hostile_blobs import seal, split

from xkv_artifacts.calibration_format import identified, read_calibration, verify, write_calibration
from xkv_artifacts.errors import CorruptArtifact, UnsupportedFormat
from xkv_artifacts.header import DIGEST_SLICE

Json = dict[str, Any]
Change = Callable[[Json, Json], object]
READERS = [read_calibration, verify]


def _good() -> bytes:
    file = io.BytesIO()
    manifest, tensors = calibration()
    write_calibration(file, identified(manifest, tensors), tensors)
    return file.getvalue()


def _rebuilt(change: Change) -> bytes:
    header, manifest, data = split(_good())
    change(header, manifest)
    header["__metadata__"]["xkv"] = json.dumps(manifest, separators=(",", ":"))
    return seal(json.dumps(header, separators=(",", ":")).encode(), data)


def _field(name: str, value: Any) -> Change:
    return lambda header, manifest: manifest.update({name: value})


def _sample(**fields: Any) -> Change:
    return lambda header, manifest: manifest["sample"].update(fields)


def _rename(header: Json, manifest: Json) -> None:
    for place in (header, manifest["tensors"]):
        place["layer.9.planes"] = place.pop("layer.0.planes")


def _swap(header: Json, manifest: Json) -> None:
    first, second = "layer.0.planes", "group.0.key.bases"
    header[first], header[second] = header[second], header[first]


CORRUPT: dict[str, tuple[Change, str]] = {
    "another calibration's id": (_field("id", "a" * 64), "is not that of this model"),
    "an id that is a path": (_field("id", "../../x"), "id"),
    "no id": (lambda h, m: m.pop("id"), "is not that of this model"),
    "another model": (lambda h, m: m["model"].update(fingerprint="e" * 64), "is not that of this model"),
    "another sample": (_sample(sha256="e" * 64), "is not that of this model"),
    "other settings": (_field("settings", {}), "is not that of this model"),
    "settings that are a list": (_field("settings", []), "settings"),
    "other groups": (_field("groups", [[0, 1, 2, 3]]), "is not that of this model"),
    "no groups": (_field("groups", []), "groups"),
    "an empty group": (_field("groups", [[0, 1], []]), "groups"),
    "a layer in two groups": (_field("groups", [[0, 1], [1, 2]]), "named twice"),
    "a layer below zero": (_field("groups", [[-1, 0]]), "groups"),
    "a layer of 2^70": (_field("groups", [[2**70]]), "groups"),
    "a sample of nothing": (_sample(tokens=0), "sample.tokens"),
    "a sample with more": (_sample(path="/etc/passwd"), "sample.path"),
    "figures that are no object": (_field("figures", 3), "figures"),
    "figures nested too deeply": (_field("figures", json.loads('{"a":' * 20 + "1" + "}" * 20)), "deeply"),
    "a figure that is no number": (_field("figures", {"x": float("nan")}), "no number"),
    "a moment without a zone": (_field("created", "2026-11-26T08:00:00"), "created"),
    "an unknown field": (_field("exec", "rm"), "exec"),
    "a missing field": (lambda h, m: m.pop("model"), "model"),
    "statistics that are not there": (_field("version", 2), "manifest field version: 2"),
    "no checksums": (lambda h, m: m.pop("tensors"), "does not know it"),
    "a tensor in another shape": (lambda h, m: h["layer.0.planes"].update(shape=[2, 1, 2]), "is not that"),
    "a tensor of another type": (
        lambda h, m: h["layer.0.planes"].update(dtype="F16"),
        "is not that of this model",
    ),
    "a tensor under another name": (_rename, "is not that of this model"),
    "two tensors that changed places": (_swap, "is not that of this model"),
    "another tensor's checksum": (
        lambda h, m: m["tensors"].update({"layer.0.planes": m["tensors"]["group.0.key.bases"]}),
        "is not that of this model",
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_it_is_refused_with_the_reason(name: str) -> None:
    change, reason = CORRUPT[name]
    for read in READERS:
        with pytest.raises(CorruptArtifact, match=reason) as caught:
            read(io.BytesIO(_rebuilt(change)))
        assert "\n" not in caught.value.message and len(caught.value.message) < 1000


@pytest.mark.parametrize("change", [_field("version", 3), _field("format", "xkv-prefix")])
def test_other_formats_and_versions_are_told_apart_from_damage(change: Change) -> None:
    for read in READERS:
        with pytest.raises(UnsupportedFormat, match="is not 'xkv-calibration' version 1 or 2"):
            read(io.BytesIO(_rebuilt(change)))


def test_the_good_one_sealed_again_is_still_good() -> None:
    assert read_calibration(io.BytesIO(_rebuilt(lambda h, m: None)))[0].sample.documents == 2


def test_every_single_bit_counts() -> None:
    good = _good()
    for byte in range(len(good)):
        bad = bytearray(good)
        bad[byte] ^= 1 << (byte % 8)
        for read in READERS:
            with pytest.raises(CorruptArtifact):
                read(io.BytesIO(bad))
    for size in range(len(good)):
        with pytest.raises(CorruptArtifact):
            read_calibration(io.BytesIO(good[:size]))
    with pytest.raises(CorruptArtifact):
        read_calibration(io.BytesIO(good + b"\0"))


def test_a_header_of_random_json_never_raises_anything_else() -> None:
    source, good = random.Random(7), _good()
    length = int.from_bytes(good[:8], "little")
    for _ in range(500):
        header = bytearray(good[8 : 8 + length])
        for _ in range(source.randint(1, 4)):
            position = source.randrange(DIGEST_SLICE.stop, length)
            header[position] = source.choice(b'{}[]",:0123456789eE+-.\\untrfalse \x00\xff')
        try:
            read_calibration(io.BytesIO(seal(bytes(header), good[8 + length :])))
        except (CorruptArtifact, UnsupportedFormat):
            continue
