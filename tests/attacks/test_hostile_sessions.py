"""Session files made to mislead a reader: refused as corrupt with the reason, and never anything else."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
import torch
from hostile_blobs import seal, split

from xkv_artifacts.checked_file import lay_out
from xkv_artifacts.errors import CorruptArtifact, UnsupportedFormat
from xkv_artifacts.header import DIGEST_SLICE
from xkv_artifacts.manifest import ModelIdentity
from xkv_artifacts.session_format import Message, SessionManifest, read_session

Json = dict[str, Any]
Change = Callable[[Json, Json], object]


def _good() -> bytes:
    manifest = SessionManifest(
        model=ModelIdentity(fingerprint="f" * 64, name="tiny", architecture="Llama", dtype="bfloat16"),
        artifact="a" * 64,
        selection={"selector": "auto"},
        tokens=12,
        prefix_tokens=8,
        folded=(1,),
        system_prompt=None,
        template="chat",
        messages=(Message(role="user", content="Why?"),),
        created=datetime(2026, 11, 22, tzinfo=timezone.utc),
    )
    file = io.BytesIO()
    tensors = {
        "tokens": torch.arange(12, dtype=torch.int32),
        "document": torch.tensor(list(b"text"), dtype=torch.uint8),
        "layer.0.tail.keys": torch.zeros(3, 2, 4, dtype=torch.bfloat16),
    }
    lay_out(manifest, tensors).write(file)
    return file.getvalue()


def _rebuilt(change: Change) -> bytes:
    header, manifest, data = split(_good())
    change(header, manifest)
    header["__metadata__"]["xkv"] = json.dumps(manifest, separators=(",", ":"))
    return seal(json.dumps(header, separators=(",", ":")).encode(), data)


def _field(name: str, value: Any) -> Change:
    return lambda header, manifest: manifest.update({name: value})


CORRUPT: dict[str, tuple[Change, str]] = {
    "token count that lies": (_field("tokens", 11), "I32 of shape"),
    "tokens of another dtype": (lambda h, m: h["tokens"].update(dtype="F32"), "I32 of shape"),
    "no tokens": (_field("tokens", 0), "tokens"),
    "a prefix longer than everything": (_field("prefix_tokens", 13), "more than all tokens"),
    "folded tokens behind the end": (_field("folded", [2, 3]), "more than all tokens"),
    "folded tokens below zero": (_field("folded", [-1]), "folded"),
    "a fold of 2^70 tokens": (_field("folded", [2**70]), "folded"),
    "an artifact without selection": (_field("selection", None), "go together"),
    "a selection without artifact": (_field("artifact", None), "go together"),
    "an artifact that is a path": (_field("artifact", "../../x"), "artifact"),
    "a role with a line": (_field("messages", [{"role": "user\n", "content": ""}]), "messages"),
    "a message with more": (_field("messages", [{"role": "user", "content": "", "x": 1}]), "messages"),
    "a message that is no text": (_field("messages", [{"role": "user", "content": 1}]), "messages"),
    "an unknown template": (_field("template", "exec"), "template"),
    "an unknown field": (_field("exec", "rm"), "exec"),
    "a missing field": (lambda h, m: m.pop("model"), "model"),
    "no checksums": (lambda h, m: m.pop("tensors"), "does not know it"),
    "a document of two dimensions": (lambda h, m: h["document"].update(shape=[2, 2]), "one dimension"),
    "a document of numbers": (lambda h, m: h["document"].update(dtype="F32", shape=[1]), "one dimension"),
    "another tensor's checksum": (
        lambda h, m: m["tensors"].update(document=m["tensors"]["tokens"]),
        "checksum",
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_it_is_refused_with_the_reason(name: str) -> None:
    change, reason = CORRUPT[name]
    with pytest.raises(CorruptArtifact, match=reason) as caught:
        read_session(io.BytesIO(_rebuilt(change)))
    assert "\n" not in caught.value.message and len(caught.value.message) < 1000


@pytest.mark.parametrize("change", [_field("version", 2), _field("format", "xkv-prefix")])
def test_other_formats_and_versions_are_told_apart_from_damage(change: Change) -> None:
    with pytest.raises(UnsupportedFormat, match="is not 'xkv-session' version 1"):
        read_session(io.BytesIO(_rebuilt(change)))


def test_the_good_session_sealed_again_is_still_good() -> None:
    assert read_session(io.BytesIO(_rebuilt(lambda h, m: None)))[0].tokens == 12


def test_every_single_bit_counts() -> None:
    good = _good()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptArtifact):
            read_session(io.BytesIO(bad))
    for size in range(len(good)):
        with pytest.raises(CorruptArtifact):
            read_session(io.BytesIO(good[:size]))


def test_a_header_of_random_json_never_raises_anything_else() -> None:
    source, good = random.Random(7), _good()
    length = int.from_bytes(good[:8], "little")
    for _ in range(500):
        header = bytearray(good[8 : 8 + length])
        for _ in range(source.randint(1, 4)):
            position = source.randrange(DIGEST_SLICE.stop, length)
            header[position] = source.choice(b'{}[]",:0123456789eE+-.\\untrfalse \x00\xff')
        try:
            read_session(io.BytesIO(seal(bytes(header), good[8 + length :])))
        except (CorruptArtifact, UnsupportedFormat):
            continue
