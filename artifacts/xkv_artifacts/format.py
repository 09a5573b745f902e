"""The prefix blob: one safetensors file, its manifest in the header, every bit under a checksum.

`docs/format.md` describes the bytes. torch is imported only where tensors are made or written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

from pydantic import ValidationError

from xkv_artifacts.errors import (
    CorruptArtifact,
    InvalidKey,
    InvalidNamespace,
    MissingTensor,
    UnsupportedFormat,
)
from xkv_artifacts.header import (
    DTYPES,
    LENGTH_BYTES,
    Header,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
)
from xkv_artifacts.keys import artifact_id_of_bytes
from xkv_artifacts.manifest import FORMAT, VERSION, PrefixManifest

if TYPE_CHECKING:
    import torch

TOKENS = "tokens"
CHUNK_BYTES = 8 << 20
_TORCH_NAMES = {
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def write_prefix(
    file: BinaryIO, manifest: PrefixManifest, tensors: Mapping[str, torch.Tensor]
) -> PrefixManifest:
    """Write one prefix blob; the same input makes the same bytes.

    Tensors on the CPU that are contiguous are written from where they are, without another copy.

    Args:
        file: open for writing bytes, at its start.
        manifest: its `tensors` are filled in here.
        tensors: by name; `tokens` is int32 [T].

    Returns:
        The manifest as written, with the SHA-256 of each tensor.

    Raises:
        CorruptArtifact: manifest and tensors do not fit together (nothing is written).
    """
    views = {name: _byte_view(tensor) for name, tensor in tensors.items()}
    described = {name: _describe(name, tensor, len(views[name])) for name, tensor in tensors.items()}
    # Widest elements first, as safetensors lays tensors out: all of them start aligned.
    order = sorted(described, key=lambda name: (-DTYPES[described[name][0]], name))
    digests = {name: hashlib.sha256(views[name]).hexdigest() for name in order}
    complete = manifest.model_copy(update={"tensors": digests})
    head = build_header({name: described[name] for name in order}, complete.model_dump(mode="json"))
    total = len(head) + sum(len(view) for view in views.values())
    header = parse_header(head[:LENGTH_BYTES], head[LENGTH_BYTES:], total)
    written = _check_manifest(header)
    _check_id(written, views[TOKENS])
    for view in (memoryview(head), *(views[name] for name in order)):
        for part in _chunks(view):
            file.write(part)
    return written


def read_manifest(file: BinaryIO) -> PrefixManifest:
    """Read and check a blob's header alone; its tensors' bytes are not looked at.

    Raises:
        CorruptArtifact, UnsupportedFormat: the file is not a prefix artifact that this code reads.
    """
    return _open(file)[0]


def read_prefix(
    file: BinaryIO, names: Iterable[str] | None = None
) -> tuple[PrefixManifest, dict[str, torch.Tensor]]:
    """Read tensors (all, or only `names`: just their byte ranges), each checked against its checksum.

    Raises:
        CorruptArtifact: the header or one of these tensors is not what was written.
        MissingTensor: a name is not in the blob.
    """
    manifest, header = _open(file)
    wanted = list(header.tensors) if names is None else list(names)
    missing = [name for name in wanted if name not in header.tensors]
    if missing:
        raise MissingTensor(f"artifact {manifest.id} has no tensor {missing[0]}")
    buffers = {}
    for info in sorted((header.tensors[name] for name in wanted), key=lambda info: info.start):
        buffers[info.name] = _read_checked(file, info, manifest.tensors[info.name])
    if TOKENS in buffers:
        _check_id(manifest, buffers[TOKENS])
    return manifest, {name: _as_tensor(header.tensors[name], buffers[name]) for name in wanted}


def read_tokens(file: BinaryIO) -> tuple[PrefixManifest, bytes]:
    """The manifest and the token ids as little-endian int32 bytes, checked against the artifact's id.

    Raises:
        CorruptArtifact, UnsupportedFormat: as `read_prefix`.
    """
    manifest, header = _open(file)
    tokens = _read_checked(file, header.tensors[TOKENS], manifest.tensors[TOKENS])
    _check_id(manifest, tokens)
    return manifest, bytes(tokens)


def verify(file: BinaryIO) -> PrefixManifest:
    """Re-read and check every byte of a blob, a few MiB at a time, without torch.

    Raises:
        CorruptArtifact: names every tensor that is not what was written.
        UnsupportedFormat: written by another version.
    """
    manifest, header = _open(file)
    faults = []
    for info in sorted(header.tensors.values(), key=lambda info: info.start):
        digest = hashlib.sha256()
        for part in _read_range(file, info):
            digest.update(part)
        if digest.hexdigest() != manifest.tensors[info.name]:
            faults.append(info.name)
    if faults:
        raise CorruptArtifact(f"tensor {', '.join(faults)}: the checksum does not match")
    _check_id(manifest, _read_checked(file, header.tensors[TOKENS], manifest.tensors[TOKENS]))
    return manifest


def _open(file: BinaryIO) -> tuple[PrefixManifest, Header]:
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(LENGTH_BYTES)
    length = header_length(prefix, file_bytes)
    raw = file.read(length)
    if len(raw) < length:
        raise CorruptArtifact("the file was truncated while it was read")
    header = parse_header(prefix, raw, file_bytes)
    return _check_manifest(header), header


def _check_manifest(header: Header) -> PrefixManifest:
    found = header.manifest.get("format"), header.manifest.get("version")
    if found != (FORMAT, VERSION):
        raise UnsupportedFormat(
            f"format {str(found[0])[:40]!r} version {str(found[1])[:40]} is not {FORMAT!r} version {VERSION}",
            hint="read it with the version of xkv-service that wrote it, or compute it again",
        )
    try:
        manifest = PrefixManifest.model_validate(header.manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise CorruptArtifact(f"manifest field {where}: {first['msg'][:200]}") from None
    if manifest.tensors.keys() != header.tensors.keys():
        name = min(manifest.tensors.keys() ^ header.tensors.keys())
        side = "header" if name in manifest.tensors else "manifest"
        raise CorruptArtifact(f"tensor {name[:80]!r}: the {side} does not know it")
    tokens = header.tensors.get(TOKENS)
    if tokens is None or (tokens.dtype, tokens.shape) != ("I32", (manifest.tokens,)):
        raise CorruptArtifact(f"tensor {TOKENS}: must be I32 of shape [{manifest.tokens}]")
    return manifest


def _check_id(manifest: PrefixManifest, tokens: bytes | bytearray | memoryview) -> None:
    """The id is a function of what the manifest says, so a swapped field shows."""
    try:
        expected = artifact_id_of_bytes(
            manifest.model.fingerprint, manifest.namespace, bytes(tokens), manifest.spec
        )
    except (InvalidKey, InvalidNamespace) as error:
        raise CorruptArtifact(f"manifest: {error.message}") from None
    if expected != manifest.id:
        raise CorruptArtifact(f"the id {manifest.id} is not that of this model, namespace, tokens and spec")


def _read_range(file: BinaryIO, info: TensorInfo) -> Iterator[bytes]:
    file.seek(info.start)
    left = info.nbytes
    while left:
        part = file.read(min(left, CHUNK_BYTES))
        if not part:
            raise CorruptArtifact(f"tensor {info.name}: the file was truncated while it was read")
        left -= len(part)
        yield part


def _read_checked(file: BinaryIO, info: TensorInfo, expected: str) -> bytearray:
    """Read one tensor into the buffer it will live in, so that what is checked is what is returned."""
    buffer = bytearray(info.nbytes)
    view = memoryview(buffer)
    digest = hashlib.sha256()
    file.seek(info.start)
    done = 0
    while done < info.nbytes:
        count = file.readinto(view[done : done + CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise CorruptArtifact(f"tensor {info.name}: the file was truncated while it was read")
        digest.update(view[done : done + count])
        done += count
    if digest.hexdigest() != expected:
        raise CorruptArtifact(f"tensor {info.name}: the checksum does not match")
    return buffer


def _as_tensor(info: TensorInfo, buffer: bytearray) -> torch.Tensor:
    import torch

    dtype = getattr(torch, _TORCH_NAMES[info.dtype])
    if not buffer:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


def _byte_view(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _describe(name: str, tensor: torch.Tensor, nbytes: int) -> tuple[str, tuple[int, ...], int]:
    torch_name = str(tensor.dtype).removeprefix("torch.")
    for dtype, known in _TORCH_NAMES.items():
        if known == torch_name:
            return dtype, tuple(tensor.shape), nbytes
    raise CorruptArtifact(f"tensor {name}: dtype {torch_name} cannot be stored")


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]
