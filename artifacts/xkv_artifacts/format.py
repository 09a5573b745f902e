"""The prefix blob: one safetensors file, its manifest in the header, every bit under a checksum.

`docs/format.md` describes the bytes. torch is imported only where tensors are made or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from xkv_artifacts.checked_file import (
    as_tensor,
    check_tensors,
    dtype_of,
    fill_checked,
    lay_out,
    open_header,
    parse_manifest,
    read_checked,
)
from xkv_artifacts.errors import CorruptArtifact, InvalidKey, InvalidNamespace, MissingTensor
from xkv_artifacts.header import Header, TensorInfo
from xkv_artifacts.keys import artifact_id_of_bytes
from xkv_artifacts.manifest import FORMAT, VERSION, PrefixManifest
from xkv_artifacts.positioned import PositionedFile
from xkv_artifacts.read_ahead import Landing, read_ahead

if TYPE_CHECKING:
    import torch

TOKENS = "tokens"


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
    ready = lay_out(manifest, tensors)
    written = _check_manifest(ready.header)
    _check_id(written, ready.views[TOKENS])
    ready.write(file)
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
    return manifest, _read(file, manifest, header, list(header.tensors) if names is None else list(names))


def read_parts(
    file: BinaryIO, parts: Iterable[Iterable[str]], landing: Landing | None = None
) -> tuple[PrefixManifest, Iterator[dict[str, torch.Tensor]]]:
    """As `read_prefix`, the tensors of each part only when it is asked for.

    Args:
        landing: where tensors go to, on whose threads; the next parts are read while one is used. By default
            each part is read to the CPU when it is asked for.
    """
    manifest, header = _open(file)
    if landing is None:
        return manifest, (_read(file, manifest, header, list(names)) for names in parts)
    return manifest, _landed(file, manifest, header, parts, landing)


def _landed(
    file: BinaryIO, manifest: PrefixManifest, header: Header, parts: Iterable[Iterable[str]], landing: Landing
) -> Iterator[dict[str, torch.Tensor]]:
    source = PositionedFile(file)

    def read(info: TensorInfo) -> tuple[str, torch.Tensor]:
        buffer = landing.buffer(info.name, info.nbytes)
        if info.nbytes:
            fill_checked(source, info, manifest.tensors[info.name], buffer.numpy().data)
        return info.name, landing.placed(info.name, buffer.view(dtype_of(info)).reshape(info.shape))

    jobs = ([partial(read, info) for info in _wanted(manifest, header, list(names))] for names in parts)
    with closing(read_ahead(jobs, landing.threads)) as found:
        for part in found:
            tensors = dict(part)
            if TOKENS in tensors:
                _check_id(manifest, tensors[TOKENS].cpu().numpy().tobytes())
            yield tensors


def _read(
    file: BinaryIO, manifest: PrefixManifest, header: Header, wanted: list[str]
) -> dict[str, torch.Tensor]:
    buffers = {}
    for info in _wanted(manifest, header, wanted):
        buffers[info.name] = read_checked(file, info, manifest.tensors[info.name])
    if TOKENS in buffers:
        _check_id(manifest, buffers[TOKENS])
    return {name: as_tensor(header.tensors[name], buffers[name]) for name in wanted}


def _wanted(manifest: PrefixManifest, header: Header, names: list[str]) -> list[TensorInfo]:
    """What the header says of these tensors, in the order of the file."""
    missing = [name for name in names if name not in header.tensors]
    if missing:
        raise MissingTensor(f"artifact {manifest.id} has no tensor {missing[0]}")
    return sorted((header.tensors[name] for name in names), key=lambda info: info.start)


def read_tokens(
    file: BinaryIO, on_manifest: Callable[[PrefixManifest], None] | None = None
) -> tuple[PrefixManifest, bytes]:
    """The manifest and the token ids as little-endian int32 bytes, checked against the artifact's id.

    Args:
        on_manifest: told what the header says before the token ids are read.

    Raises:
        CorruptArtifact, UnsupportedFormat: as `read_prefix`.
    """
    manifest, header = _open(file)
    if on_manifest is not None:
        on_manifest(manifest)
    tokens = read_checked(file, header.tensors[TOKENS], manifest.tensors[TOKENS])
    _check_id(manifest, tokens)
    return manifest, bytes(tokens)


def verify(file: BinaryIO) -> PrefixManifest:
    """Re-read and check every byte of a blob, a few MiB at a time, without torch.

    Raises:
        CorruptArtifact: names every tensor that is not what was written.
        UnsupportedFormat: written by another version.
    """
    manifest, header = _open(file)
    check_tensors(file, header, manifest.tensors)
    _check_id(manifest, read_checked(file, header.tensors[TOKENS], manifest.tensors[TOKENS]))
    return manifest


def _open(file: BinaryIO) -> tuple[PrefixManifest, Header]:
    header = open_header(file)
    return _check_manifest(header), header


def _check_manifest(header: Header) -> PrefixManifest:
    manifest = parse_manifest(header, PrefixManifest, FORMAT, VERSION)
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
