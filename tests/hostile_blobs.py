"""Blobs made to mislead a reader, with checksums that are right all the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from artifact_samples import sample

from xkv_artifacts.format import write_prefix
from xkv_artifacts.header import DIGEST_SLICE, header_digest

Json = dict[str, Any]


def good_blob() -> bytes:
    file = io.BytesIO()
    write_prefix(file, *sample())
    return file.getvalue()


def split(blob: bytes) -> tuple[Json, Json, bytes]:
    """(header, manifest, data) of a blob."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["xkv"]), blob[8 + length :]


def seal(header: bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A blob with the right header checksum."""
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    digest = header_digest(prefix, header).encode()
    return prefix + header[: DIGEST_SLICE.start] + digest + header[DIGEST_SLICE.stop :] + data


def rebuilt(change: Callable[[Json, Json], object], data: bytes | None = None) -> bytes:
    """The good blob with its header and manifest changed, and sealed again."""
    header, manifest, good_data = split(good_blob())
    change(header, manifest)
    header["__metadata__"]["xkv"] = json.dumps(manifest, separators=(",", ":"))
    return seal(json.dumps(header, separators=(",", ":")).encode(), good_data if data is None else data)


def replaced(old: str, new: str) -> bytes:
    """The good blob with text in its header replaced, and sealed again."""
    blob = good_blob()
    length = int.from_bytes(blob[:8], "little")
    header = blob[8 : 8 + length].decode()
    assert old in header
    return seal(header.replace(old, new, 1).encode("utf-8", "surrogatepass"), blob[8 + length :])


def entry(**fields: Any) -> Callable[[Json, Json], object]:
    return lambda header, manifest: header["group.0.key.factors.0"].update(fields)


def field(name: str, value: Any) -> Callable[[Json, Json], object]:
    return lambda header, manifest: manifest.update({name: value})


def model(**fields: Any) -> Callable[[Json, Json], object]:
    return lambda header, manifest: manifest["model"].update(fields)


def extra_tensor(name: str, info: Any) -> Callable[[Json, Json], object]:
    def change(header: Json, manifest: Json) -> None:
        header[name] = info
        manifest["tensors"][name] = "0" * 64

    return change


def shift(name: str, by: int) -> Callable[[Json, Json], object]:
    def change(header: Json, manifest: Json) -> None:
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

    return change


def with_second_metadata() -> bytes:
    blob = good_blob()
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"]["format"] = "pt"
    return seal(json.dumps(header, separators=(",", ":")).encode(), blob[8 + length :])
