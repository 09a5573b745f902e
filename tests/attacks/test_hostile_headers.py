"""Blobs made to mislead a reader: each is refused as corrupt, with the reason, and never anything else.

The checksums of these files are right: whoever makes a hostile file can compute them too.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable

import pytest
from hostile_blobs import (
    entry,
    extra_tensor,
    field,
    good_blob,
    model,
    rebuilt,
    replaced,
    seal,
    shift,
    with_second_metadata,
)

from xkv_artifacts.errors import CorruptArtifact, UnsupportedFormat
from xkv_artifacts.format import read_manifest, read_prefix, read_tokens, verify
from xkv_artifacts.header import DIGEST_SLICE, MAX_HEADER_BYTES

EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
DEEP = "[" * 100_000 + "]" * 100_000

CORRUPT: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "empty file": (lambda: b"", "truncated"),
    "7 bytes": (lambda: good_blob()[:7], "truncated"),
    "length only": (lambda: good_blob()[:8], "truncated"),
    "length over the file": (lambda: (10**6).to_bytes(8, "little") + b"{}", "truncated"),
    "length of all ones": (lambda: b"\xff" * 8 + good_blob()[8:], "at most"),
    "length over the cap": (lambda: (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "at most"),
    "length zero": (lambda: bytes(8) + good_blob()[8:], "does not begin"),
    "random bytes": (lambda: random.Random(0).randbytes(5000), None),
    "all zeros": (lambda: bytes(5000), "does not begin"),
    "a foreign safetensors file": (lambda: (2).to_bytes(8, "little") + b"{}", "does not begin"),
    "a pickle": (lambda: b"\x80\x04K\x01." + bytes(100), None),
    "wrong header checksum": (lambda: good_blob().replace(b"tiny", b"tinY", 1), "header's checksum"),
    "not JSON": (lambda: replaced('"data_offsets"', '"data_offsets'), "not valid JSON"),
    "JSON with a second value": (lambda: replaced("}}", "}}{}"), "not valid JSON"),
    "invalid UTF-8": (lambda: replaced('"dtype"', '"dty\udcffpe"'), "not valid JSON"),
    "deep nesting": (lambda: replaced('"tokens":{', f'"deep":{DEEP},"tokens":{{'), "nested"),
    "deep nesting below the recursion limit": (
        lambda: rebuilt(field("spec", {"a": json.loads("[" * 30 + "]" * 30)})),
        "nested",
    ),
    "duplicate tensor": (
        lambda: replaced('"tokens":{', '"tokens":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"tokens":{'),
        "a key appears twice",
    ),
    "duplicate field of a tensor": (lambda: replaced('"dtype":', '"dtype":"U8","dtype":'), "twice"),
    "duplicate manifest field": (lambda: replaced('\\"tokens\\":', '\\"tokens\\":1,\\"tokens\\":'), "twice"),
    "NaN": (lambda: replaced('\\"kl\\":0.5', '\\"kl\\":NaN'), "NaN is no number"),
    "infinity": (lambda: replaced('\\"kl\\":0.5', '\\"kl\\":-Infinity'), "no number"),
    "overflowing float": (lambda: replaced('\\"kl\\":0.5', '\\"kl\\":1e999'), "out of range"),
    "endless integer": (lambda: replaced('\\"kl\\":0.5', '\\"kl\\":' + "9" * 5000), "not valid JSON"),
    "huge integer": (lambda: rebuilt(field("bytes_full", 10**400)), "bytes_full"),
    "lone surrogate": (lambda: replaced("corpus/lisbon", "corpus/\\\\ud800"), "not Unicode"),
    "unknown dtype": (lambda: rebuilt(entry(dtype="F128")), "unknown dtype 'F128'"),
    "bool dtype": (lambda: rebuilt(entry(dtype="BOOL")), "unknown dtype"),
    "dtype that is no text": (lambda: rebuilt(entry(dtype=["BF16"])), "unknown dtype"),
    "negative offset": (lambda: rebuilt(entry(data_offsets=[-1, 12799])), "data_offsets"),
    "offsets in the wrong order": (lambda: rebuilt(entry(data_offsets=[12800, 0])), "data_offsets"),
    "three offsets": (lambda: rebuilt(entry(data_offsets=[0, 1, 2])), "data_offsets"),
    "offsets as floats": (lambda: rebuilt(entry(data_offsets=[0.0, 12800.0])), "data_offsets"),
    "offsets as truth values": (lambda: rebuilt(entry(data_offsets=[False, True])), "data_offsets"),
    "offsets past the end": (lambda: rebuilt(shift("layer.0.sketch.codes", 10**9)), "leaves a hole"),
    "offsets of 2^64": (lambda: rebuilt(entry(data_offsets=[2**64, 2**64 + 12800])), "data_offsets"),
    "overlapping tensors": (lambda: rebuilt(shift("layer.0.sketch.codes", -1)), "overlaps"),
    "a hole": (lambda: rebuilt(shift("layer.0.sketch.codes", 1)), "leaves a hole"),
    "two names for the same bytes": (
        lambda: rebuilt(lambda h, m: extra_tensor("copy", dict(h["layer.0.sketch.codes"]))(h, m)),
        "overlaps",
    ),
    "trailing bytes": (lambda: good_blob() + b"\0", "1 bytes follow the last tensor"),
    "missing last byte": (lambda: good_blob()[:-1], "truncated"),
    "shape overflow": (lambda: rebuilt(entry(shape=[2**31, 2**31, 2**31])), "overflows"),
    "shape overflow to zero": (lambda: rebuilt(entry(shape=[2**62, 4, 0, 1])), "the offsets span"),
    "shape too large for its bytes": (lambda: rebuilt(entry(shape=[100, 65])), "need 13000 bytes"),
    "negative size": (lambda: rebuilt(entry(shape=[-100, -64])), "shape"),
    "sizes as text": (lambda: rebuilt(entry(shape=["100", 64])), "shape"),
    "shape that is no list": (lambda: rebuilt(entry(shape={"0": 100})), "shape"),
    "a thousand dimensions": (lambda: rebuilt(entry(shape=[1] * 1000)), "at most 8"),
    "unknown tensor field": (lambda: rebuilt(entry(stride=[1])), "nothing else"),
    "entry that is no object": (lambda: rebuilt(extra_tensor("x", [1])), "nothing else"),
    "name with a path": (lambda: rebuilt(extra_tensor("../../etc/passwd", EMPTY)), "name .* not allowed"),
    "name with a zero byte": (lambda: rebuilt(extra_tensor("a\0b", EMPTY)), "not allowed"),
    "name with a newline": (lambda: rebuilt(extra_tensor("tokens\n", EMPTY)), "not allowed"),
    "empty name": (lambda: rebuilt(extra_tensor("", EMPTY)), "not allowed"),
    "name of 10,000 letters": (lambda: rebuilt(extra_tensor("a" * 10_000, EMPTY)), "not allowed"),
    "tensor the manifest does not know": (
        lambda: rebuilt(lambda h, m: h.update(x=EMPTY)),
        "the manifest does not know it",
    ),
    "tensor the header does not know": (
        lambda: rebuilt(lambda h, m: m["tensors"].update(x="0" * 64)),
        "the header does not know it",
    ),
    "no checksum for a tensor": (lambda: rebuilt(lambda h, m: m["tensors"].popitem()), "does not know it"),
    "checksum of another tensor": (
        lambda: rebuilt(lambda h, m: m["tensors"].update(tokens="0" * 64)),
        "tensor tokens: the checksum",
    ),
    "checksum that is none": (
        lambda: rebuilt(lambda h, m: m["tensors"].update(tokens="x")),
        "tensors.tokens",
    ),
    "no tokens": (lambda: rebuilt(lambda h, m: (h.pop("tokens"), m["tensors"].pop("tokens"))), None),
    "token count that lies": (lambda: rebuilt(field("tokens", 99)), "I32 of shape"),
    "tokens of another dtype": (lambda: rebuilt(lambda h, m: h["tokens"].update(dtype="F32")), "I32"),
    "metadata that is no object": (
        lambda: seal(b'{"__metadata__":{"xkv":"{\\"header_sha256\\":\\"' + b"0" * 64 + b'\\"}"},"x":1}', b""),
        "nothing else",
    ),
    "second metadata key": (lambda: with_second_metadata(), "metadata must hold"),
    "manifest that is no object": (
        lambda: seal(b'{"__metadata__":{"xkv":"{\\"header_sha256\\":\\"' + b"0" * 64 + b'\\"}]"}}', b""),
        "not valid JSON",
    ),
    "unknown manifest field": (lambda: rebuilt(field("exec", "rm")), "exec"),
    "missing manifest field": (lambda: rebuilt(lambda h, m: m.pop("fidelity")), "fidelity"),
    "fidelity over one": (lambda: rebuilt(lambda h, m: m["fidelity"].update(top1_agreement=1.5)), "top1"),
    "namespace with a path": (lambda: rebuilt(field("namespace", "../x")), "namespace"),
    "fingerprint of another model": (lambda: rebuilt(model(fingerprint="0" * 64)), "is not that of"),
    "id of another artifact": (lambda: rebuilt(field("id", "0" * 64)), "is not that of"),
    "spec of another artifact": (lambda: rebuilt(field("spec", {"ratio": 2})), "is not that of"),
    "time without a zone": (lambda: rebuilt(field("created", "2026-01-01T00:00:00")), "created"),
    "layer number of 2^70": (lambda: rebuilt(lambda h, m: m["groups"][0].update(layers=[2**70])), "groups"),
}
OTHER_FORMAT = {
    "later version": (field("version", 2), "version 2"),
    "version as text": (field("version", "1"), "version 1"),
    "other format": (field("format", "xkv-session"), "xkv-session"),
    "no format": (lambda header, manifest: manifest.pop("format"), "None"),
    "version with a terminal code": (field("version", "\x1b[2J" * 1000), "version"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_it_is_refused_with_the_reason(name: str) -> None:
    make, reason = CORRUPT[name]
    blob = make()
    for read in (read_prefix, verify):
        with pytest.raises(CorruptArtifact, match=reason) as caught:
            read(io.BytesIO(blob))
        assert "\n" not in caught.value.message and len(caught.value.message) < 1000
    for read in (read_manifest, read_tokens):  # these look at less, and may find nothing wrong there
        try:
            read(io.BytesIO(blob))
        except CorruptArtifact:
            continue


@pytest.mark.parametrize("name", OTHER_FORMAT)
def test_other_formats_and_versions_are_told_apart_from_damage(name: str) -> None:
    change, reason = OTHER_FORMAT[name]
    with pytest.raises(UnsupportedFormat, match=reason):
        read_prefix(io.BytesIO(rebuilt(change)))


def test_the_good_blob_sealed_again_is_still_good() -> None:
    assert verify(io.BytesIO(rebuilt(lambda header, manifest: None))).tokens == 100


def test_a_header_of_random_json_never_raises_anything_else() -> None:
    source = random.Random(7)
    good = good_blob()
    length = int.from_bytes(good[:8], "little")
    for _ in range(500):
        header = bytearray(good[8 : 8 + length])
        for _ in range(source.randint(1, 4)):
            position = source.randrange(DIGEST_SLICE.stop, length)
            header[position] = source.choice(b'{}[]",:0123456789eE+-.\\untrfalse \x00\xff')
        try:
            verify(io.BytesIO(seal(bytes(header), good[8 + length :])))
        except (CorruptArtifact, UnsupportedFormat):
            continue
