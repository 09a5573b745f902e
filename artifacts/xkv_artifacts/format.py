"""The prefix blob: one safetensors file, its manifest in the header, every bit under a checksum.

`docs/format.md` describes the bytes. torch is imported only where tensors are made or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO

from xkv_artifacts.checked_file import (
    CHUNK_BYTES,
    as_tensor,
    check_tensors,
    dtype_of,
    fill_extent,
    lay_out,
    parse_manifest,
    read_checked,
    read_head,
)
from xkv_artifacts.errors import CorruptArtifact, InvalidKey, InvalidNamespace, MissingTensor
from xkv_artifacts.extents import Extent, extents_of, jobs_of
from xkv_artifacts.header import Header, TensorInfo, parse_header
from xkv_artifacts.keys import artifact_id_of_bytes
from xkv_artifacts.manifest import FORMAT, VERSION, PrefixManifest
from xkv_artifacts.positioned import PositionedFile
from xkv_artifacts.read_ahead import Landing, read_ahead

if TYPE_CHECKING:
    import torch

TOKENS = "tokens"
_MOST_KEPT = 1 << 20
"""Bytes of a header that is kept parsed; one of 600 tensors has a tenth."""


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

    def read(extents: list[Extent]) -> list[tuple[str, torch.Tensor]]:
        found = []
        for extent in extents:
            buffer = landing.buffer(extent.place, extent.nbytes)
            if extent.nbytes:
                fill_extent(source, extent, manifest.tensors, buffer.numpy().data)
            placed = landing.placed(extent.place, buffer)
            found += [(info.name, _of_bytes(info, placed[extent.range_of(info)])) for info in extent.infos]
        return found

    def jobs(names: Iterable[str]) -> list[Callable[[], list[tuple[str, torch.Tensor]]]]:
        extents = extents_of(_wanted(manifest, header, list(names)), landing.place, CHUNK_BYTES)
        return [partial(read, one) for one in jobs_of(extents, CHUNK_BYTES)]

    with closing(read_ahead(map(jobs, parts), landing.threads, together=landing.together)) as found:
        for part in found:
            tensors = dict(chain.from_iterable(part))
            if TOKENS in tensors:
                _check_id(manifest, tensors[TOKENS].cpu().numpy().tobytes())
            yield tensors


def _of_bytes(info: TensorInfo, buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view(dtype_of(info)).reshape(info.shape)


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
    head = read_head(file)
    return _kept(*head) if len(head[1]) <= _MOST_KEPT else _parsed(*head)


def _parsed(prefix: bytes, raw: bytes, file_bytes: int) -> tuple[PrefixManifest, Header]:
    header = parse_header(prefix, raw, file_bytes)
    return _check_manifest(header), header


_kept = lru_cache(maxsize=2)(_parsed)
"""A load asks for the same header twice: once for what it promises, once for the tensors."""


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
