"""A safetensors file with a manifest in its header, every bit under a checksum: what every format shares.

`docs/format.md` describes the bytes. torch is imported only where tensors are made or written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from xkv_artifacts.errors import CorruptArtifact, UnsupportedFormat
from xkv_artifacts.extents import Extent
from xkv_artifacts.header import (
    DTYPES,
    LENGTH_BYTES,
    Header,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
)
from xkv_artifacts.positioned import PositionedFile

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 8 << 20
_TORCH_NAMES = {
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


Kind = TypeVar("Kind", bound=BaseModel)


@dataclass(frozen=True)
class LaidOut:
    """A file that is ready to be written.

    Args:
        head: length prefix and header as bytes. header: the same, parsed and checked.
        views: each tensor's bytes, in the order of the file.
    """

    head: bytes
    header: Header
    views: Mapping[str, memoryview]

    def write(self, file: BinaryIO) -> None:
        """Write all of it, a few MiB at a time."""
        for view in (memoryview(self.head), *self.views.values()):
            for start in range(0, len(view), CHUNK_BYTES):
                file.write(view[start : start + CHUNK_BYTES])


def lay_out(manifest: BaseModel, tensors: Mapping[str, torch.Tensor]) -> LaidOut:
    """Make a file's header; the same input makes the same bytes.

    Tensors on the CPU that are contiguous are used from where they are, without another copy.

    Args:
        manifest: its `tensors` are filled in here.
        tensors: by name.

    Raises:
        CorruptArtifact: a tensor or a manifest that cannot be stored.
    """
    views = {name: _byte_view(tensor) for name, tensor in tensors.items()}
    described = {name: _describe(name, tensor, len(views[name])) for name, tensor in tensors.items()}
    # Widest elements first, as safetensors lays tensors out: all of them start aligned.
    order = sorted(described, key=lambda name: (-DTYPES[described[name][0]], name))
    digests = {name: hashlib.sha256(views[name]).hexdigest() for name in order}
    complete = manifest.model_copy(update={"tensors": digests})
    head = build_header({name: described[name] for name in order}, complete.model_dump(mode="json"))
    total = len(head) + sum(len(view) for view in views.values())
    header_length(head[:LENGTH_BYTES], total)
    header = parse_header(head[:LENGTH_BYTES], head[LENGTH_BYTES:], total)
    return LaidOut(head, header, {name: views[name] for name in order})


def open_header(file: BinaryIO) -> Header:
    """Read and check a file's header; its tensors' bytes are not looked at.

    Raises:
        CorruptArtifact: the header is not one that this project wrote.
    """
    return parse_header(*read_head(file))


def read_head(file: BinaryIO) -> tuple[bytes, bytes, int]:
    """A file's length prefix, its header, and its size: what `parse_header` takes.

    Raises:
        CorruptArtifact: the file is too short, or the length is absurd.
    """
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(LENGTH_BYTES)
    length = header_length(prefix, file_bytes)
    raw = file.read(length)
    if len(raw) < length:
        raise CorruptArtifact("the file was truncated while it was read")
    return prefix, raw, file_bytes


def parse_manifest(header: Header, kind: type[Kind], name: str, *versions: int) -> Kind:
    """The manifest in a checked header, of the format called `name` in one of these versions.

    Raises:
        UnsupportedFormat: another format or version.
        CorruptArtifact: a field is missing, unknown or wrong, or the tensors are not those in the header.
    """
    found = header.manifest.get("format"), header.manifest.get("version")
    if found not in [(name, version) for version in versions]:
        known = " or ".join(map(str, versions))
        raise UnsupportedFormat(
            f"format {str(found[0])[:40]!r} version {str(found[1])[:40]} is not {name!r} version {known}",
            hint="read it with the version of xkv-service that wrote it, or compute it again",
        )
    try:
        manifest = kind.model_validate(header.manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise CorruptArtifact(f"manifest field {where}: {first['msg'][:200]}") from None
    _check_names(header.manifest.get("tensors", {}), header)
    return manifest


def _check_names(digests: Mapping[str, Any], header: Header) -> None:
    if digests.keys() != header.tensors.keys():
        name = min(digests.keys() ^ header.tensors.keys())
        side = "header" if name in digests else "manifest"
        raise CorruptArtifact(f"tensor {name[:80]!r}: the {side} does not know it")


def _read_range(file: BinaryIO, info: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes, in pieces of at most `CHUNK_BYTES`.

    Raises:
        CorruptArtifact: the file ends before the tensor does.
    """
    file.seek(info.start)
    left = info.nbytes
    while left:
        part = file.read(min(left, CHUNK_BYTES))
        if not part:
            raise CorruptArtifact(f"tensor {info.name}: the file was truncated while it was read")
        left -= len(part)
        yield part


def read_checked(file: BinaryIO, info: TensorInfo, expected: str) -> bytearray:
    """Read one tensor into the buffer it will live in, so that what is checked is what is returned."""
    buffer = bytearray(info.nbytes)
    fill_checked(PositionedFile(file), info, expected, memoryview(buffer))
    return buffer


def fill_checked(file: PositionedFile, info: TensorInfo, expected: str, view: memoryview) -> None:
    """Read one tensor into the memory it will live in. Several threads may do so at once.

    Args:
        expected: its SHA-256. view: of `info.nbytes` bytes.

    Raises:
        CorruptArtifact: the file ends before the tensor does, or it is not what was written.
    """
    digest = hashlib.sha256()
    for start in range(0, info.nbytes, CHUNK_BYTES):
        part = view[start : start + CHUNK_BYTES]
        file.fill(part, info.start + start, info.name)
        digest.update(part)
    _check_digest(info, digest.hexdigest(), expected)


def fill_extent(file: PositionedFile, extent: Extent, digests: Mapping[str, str], view: memoryview) -> None:
    """Read neighbouring tensors at once. As `fill_checked`.

    Args:
        digests: SHA-256 by name. view: of `extent.nbytes` bytes.
    """
    if len(extent.infos) == 1:
        fill_checked(file, extent.infos[0], digests[extent.infos[0].name], view)
        return
    file.fill(view, extent.start, extent.infos[0].name)
    for info in extent.infos:
        _check_digest(info, hashlib.sha256(view[extent.range_of(info)]).hexdigest(), digests[info.name])


def _check_digest(info: TensorInfo, found: str, expected: str) -> None:
    if found != expected:
        raise CorruptArtifact(f"tensor {info.name}: the checksum does not match")


def read_tensors(
    file: BinaryIO, header: Header, digests: Mapping[str, str], wanted: Callable[[str], bool] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of a checked header, each checked against its checksum.

    Args:
        wanted: whether a tensor of this name is read; by default all are.

    Raises:
        CorruptArtifact: names the first one that is not what was written.
    """
    chosen = [info for info in header.tensors.values() if wanted is None or wanted(info.name)]
    ordered = sorted(chosen, key=lambda info: info.start)
    return {info.name: as_tensor(info, read_checked(file, info, digests[info.name])) for info in ordered}


def check_tensors(file: BinaryIO, header: Header, digests: Mapping[str, str]) -> None:
    """Re-read every tensor, a few MiB at a time, without torch.

    Raises:
        CorruptArtifact: names every tensor that is not what was written.
    """
    faults = []
    for info in sorted(header.tensors.values(), key=lambda info: info.start):
        digest = hashlib.sha256()
        for part in _read_range(file, info):
            digest.update(part)
        if digest.hexdigest() != digests[info.name]:
            faults.append(info.name)
    if faults:
        raise CorruptArtifact(f"tensor {', '.join(faults)}: the checksum does not match")


def as_tensor(info: TensorInfo, buffer: bytearray) -> torch.Tensor:
    """The tensor of the shape and dtype in `info` that lives in `buffer`, not copied."""
    import torch

    if not buffer:
        return torch.empty(info.shape, dtype=dtype_of(info))
    return torch.frombuffer(buffer, dtype=dtype_of(info)).reshape(info.shape)


def dtype_of(info: TensorInfo) -> torch.dtype:
    """What PyTorch calls a tensor's dtype."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH_NAMES[info.dtype])
    return found


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
