"""The header of a blob: what a safetensors file says about itself, believed only after every check.

Blobs may come from anyone, so nothing here trusts a length, an offset, a name or a number before looking.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

from xkv_artifacts.errors import CorruptArtifact

# Bytes per element of the dtypes that a blob may hold, by safetensors name.
DTYPES: Mapping[str, int] = {
    "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8,
}  # fmt: skip
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 64 << 20
MAX_DIMENSIONS = 8
MAX_DEPTH = 16
MAX_TENSOR_BYTES = 1 << 62

METADATA = "__metadata__"
MANIFEST = "xkv"
HEADER_DIGEST = "header_sha256"
# Every header starts with these bytes and 64 hex digits: the digest is found before anything is parsed.
OPENING = rb'{"__metadata__":{"xkv":"{\"header_sha256\":\"'
DIGEST_SLICE = slice(len(OPENING), len(OPENING) + 64)
_ZEROS = b"0" * 64
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)
_MAX_NAME = 200


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `stop` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors cover the rest of the file with no hole, overlap or trailing byte."""

    tensors: Mapping[str, TensorInfo]
    manifest: Mapping[str, Any]


def header_digest(length: bytes, header: bytes) -> str:
    """SHA-256 over the length prefix and the header, the digest's own 64 digits taken as zeros."""
    digest = hashlib.sha256(length)
    digest.update(header[: DIGEST_SLICE.start])
    digest.update(_ZEROS)
    digest.update(header[DIGEST_SLICE.stop :])
    return digest.hexdigest()


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], manifest: Mapping[str, Any]
) -> bytes:
    """The length prefix and header of a blob, as safetensors lays it out, always the same for the same input.

    Args:
        tensors: (dtype, shape, bytes) by name, in the order of the data.
        manifest: plain JSON values, without `header_sha256`.
    """
    fields: dict[str, Any] = {
        METADATA: {MANIFEST: json.dumps({HEADER_DIGEST: _ZEROS.decode(), **manifest}, separators=(",", ":"))}
    }
    start = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    header = json.dumps(fields, separators=(",", ":")).encode("ascii")
    header += b" " * (-len(header) % LENGTH_BYTES)
    length = len(header).to_bytes(LENGTH_BYTES, "little")
    digest = header_digest(length, header).encode("ascii")
    return length + header[: DIGEST_SLICE.start] + digest + header[DIGEST_SLICE.stop :]


def header_length(prefix: bytes, file_bytes: int) -> int:
    """The header's length in bytes from the file's first 8 bytes.

    Raises:
        CorruptArtifact: the file is too short, or the length is absurd.
    """
    if len(prefix) < LENGTH_BYTES:
        raise CorruptArtifact(f"the file is truncated: {len(prefix)} bytes are no header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptArtifact(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if length > file_bytes - LENGTH_BYTES:
        raise CorruptArtifact(
            f"the file is truncated: its header needs {length} bytes, {file_bytes} are there"
        )
    return length


def parse_header(length: bytes, header: bytes, file_bytes: int) -> Header:
    """Check a header and return what it says.

    Raises:
        CorruptArtifact: the header is not one that this project wrote, byte for byte.
    """
    if not header.startswith(OPENING):
        raise CorruptArtifact("the header does not begin as an xKV artifact's does")
    if header[DIGEST_SLICE] != header_digest(length, header).encode("ascii"):
        raise CorruptArtifact("the header's checksum does not match")
    fields = _parse_json(header, "the header")
    metadata = fields.pop(METADATA, None)
    if (
        not isinstance(metadata, dict)
        or set(metadata) != {MANIFEST}
        or not isinstance(metadata[MANIFEST], str)
    ):
        raise CorruptArtifact(f"the header's metadata must hold one text, {MANIFEST!r}")
    manifest = _parse_json(metadata[MANIFEST].encode("utf-8", "surrogatepass"), "the manifest")
    manifest.pop(HEADER_DIGEST, None)
    data_start = LENGTH_BYTES + len(header)
    tensors = {name: _tensor_info(name, entry, data_start) for name, entry in fields.items()}
    _check_cover(tensors, data_start, file_bytes)
    return Header(tensors, manifest)


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_reject_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise CorruptArtifact(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise CorruptArtifact(f"{what} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{what} is not a JSON object")
    _check_tree(value, what)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _check_tree(value: dict[str, Any], what: str) -> None:
    """No deep nesting, and no text that cannot be written out again."""
    todo: list[tuple[dict[str, Any] | list[Any], int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if depth >= MAX_DEPTH and item:
            raise CorruptArtifact(f"{what} is nested too deeply")
        for part in chain(item, item.values()) if isinstance(item, dict) else item:
            if isinstance(part, dict | list):
                todo.append((part, depth + 1))
            elif isinstance(part, str) and not part.isascii():
                try:
                    part.encode("utf-8")
                except UnicodeEncodeError:
                    raise CorruptArtifact(f"{what} holds text that is not Unicode") from None


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise CorruptArtifact(f"tensor name {name[:80]!r} is not allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptArtifact(f"tensor {name}: an entry has dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptArtifact(f"tensor {name}: unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptArtifact(f"tensor {name}: the shape is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptArtifact(f"tensor {name}: data_offsets are not two offsets in order")
    nbytes = math.prod(shape) * DTYPES[dtype]
    if nbytes > MAX_TENSOR_BYTES:
        raise CorruptArtifact(f"tensor {name}: the shape's size overflows")
    if nbytes != offsets[1] - offsets[0]:
        raise CorruptArtifact(
            f"tensor {name}: shape and dtype need {nbytes} bytes, the offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_TENSOR_BYTES for item in value
    )


def _check_cover(tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int) -> None:
    end = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            fault = "overlaps the one before" if info.start < end else "leaves a hole before it"
            raise CorruptArtifact(f"tensor {info.name}: its data {fault}")
        end = info.stop
    if end > file_bytes:
        raise CorruptArtifact(f"the file is truncated: {end} bytes expected, {file_bytes} are there")
    if end < file_bytes:
        raise CorruptArtifact(f"{file_bytes - end} bytes follow the last tensor")
