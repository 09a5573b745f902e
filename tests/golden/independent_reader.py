"""A reader of every format written from docs/format.md alone, with the standard library alone."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

OPENING = rb'{"__metadata__":{"xkv":"{\"header_sha256\":\"'


_Tensors = dict[str, tuple[str, list[int], bytes]]


def read(blob: bytes) -> tuple[dict[str, Any], _Tensors]:
    """A prefix: (manifest, tensors as dtype, shape and bytes); AssertionError when anything is wrong."""
    manifest, tensors = _read(blob, "xkv-prefix")
    assert artifact_id(manifest, tensors["tokens"][2]) == manifest["id"]
    return manifest, tensors


def read_session(blob: bytes) -> tuple[dict[str, Any], _Tensors]:
    """A session, as `read`."""
    manifest, tensors = _read(blob, "xkv-session")
    assert tensors["tokens"][:2] == ("I32", [manifest["tokens"]])
    assert manifest["prefix_tokens"] + sum(manifest["folded"]) <= manifest["tokens"]
    return manifest, tensors


def read_calibration(blob: bytes) -> tuple[dict[str, Any], _Tensors]:
    """A calibration, as `read`."""
    manifest, tensors = _read(blob, "xkv-calibration", 1, 2)
    kept = any(name.startswith("statistics.") for name in tensors)
    assert manifest["version"] == (2 if kept else 1)
    content = {
        "groups": manifest["groups"],
        "tensors": {
            name: [dtype, shape, hashlib.sha256(data).hexdigest()]
            for name, (dtype, shape, data) in tensors.items()
        },
    }
    fields = [
        b"xkv-calibration-id-1",
        manifest["model"]["fingerprint"].encode(),
        manifest["sample"]["sha256"].encode(),
        _canonical(manifest["settings"]),
        _canonical(content),
    ]
    assert _framed_sha256(fields) == manifest["id"]
    return manifest, tensors


def _read(blob: bytes, kind: str, *versions: int) -> tuple[dict[str, Any], _Tensors]:
    (length,) = struct.unpack("<Q", blob[:8])
    header = blob[8 : 8 + length]
    start = len(OPENING)
    assert header[:start] == OPENING
    blanked = header[:start] + b"0" * 64 + header[start + 64 :]
    assert hashlib.sha256(blob[:8] + blanked).hexdigest().encode() == header[start : start + 64]
    entries = json.loads(header)
    manifest = json.loads(entries.pop("__metadata__")["xkv"])
    assert manifest["format"] == kind and manifest["version"] in (versions or (1,))
    tensors, end = {}, 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        assert first == end
        data, end = blob[first:last], last
        assert hashlib.sha256(data).hexdigest() == manifest["tensors"].pop(name)
        tensors[name] = entry["dtype"], entry["shape"], data
    assert end == len(blob) and not manifest["tensors"]
    return manifest, tensors


def artifact_id(manifest: dict[str, Any], tokens: bytes) -> str:
    fields = [
        b"xkv-prefix-id-1",
        manifest["model"]["fingerprint"].encode(),
        manifest["namespace"].encode(),
        tokens,
        _canonical(manifest["spec"]),
    ]
    return _framed_sha256(fields)


def _canonical(value: dict[str, Any]) -> bytes:
    whole = {key: int(v) if isinstance(v, float) and v == int(v) else v for key, v in value.items()}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()


def _framed_sha256(fields: list[bytes]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<Q", len(field)) + field for field in fields)).hexdigest()
