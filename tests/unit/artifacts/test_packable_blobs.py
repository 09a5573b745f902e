"""Packed blobs: the bytes that went in, under every way to read them, and nothing from a file that lies."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from xkv_artifacts import zstd_file
from xkv_artifacts.blobs import PACKED_SUFFIX, blob_name, open_blob_store
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.packable_blobs import PackableBlobs
from xkv_artifacts.zstd_file import ZstdFile, compress, may_state

ID, OTHER = "ab" * 32, "cd" * 32
CONTENT = random.Random(0).randbytes(300_000) + bytes(2_900_000) + b"the end"


def coded(content: bytes) -> bytes:
    target = io.BytesIO()
    compress(io.BytesIO(content), target, len(content))
    return target.getvalue()


@pytest.fixture
def blobs(tmp_path: Path) -> PackableBlobs:
    found = open_blob_store(str(tmp_path / "store"))
    found.put(ID, lambda file: file.write(CONTENT))
    return found


def files(blobs: PackableBlobs) -> set[str]:
    root = Path(blobs.url)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_packed_blob_is_smaller_and_reads_the_same(blobs: PackableBlobs) -> None:
    assert blobs.pack(ID) and not blobs.pack(ID)
    assert files(blobs) == {blob_name(ID, suffix=PACKED_SUFFIX)}
    assert blobs.exists(ID) and list(blobs.ids()) == [ID]
    assert blobs.size(ID) < len(CONTENT) / 2
    with blobs.open(ID) as file:
        assert file.read() == CONTENT
    assert blobs.unpack(ID) and not blobs.unpack(ID)
    assert files(blobs) == {blob_name(ID)} and blobs.size(ID) == len(CONTENT)


def test_any_zstd_reads_it(blobs: PackableBlobs) -> None:
    blobs.pack(ID)
    stored = (Path(blobs.url) / blob_name(ID, suffix=PACKED_SUFFIX)).read_bytes()
    assert zstandard.ZstdDecompressor().decompress(stored) == CONTENT


@settings(deadline=None, max_examples=40)
@given(
    reads=st.lists(st.tuples(st.integers(0, len(CONTENT) + 9), st.integers(0, 1_200_000)), max_size=5),
)
def test_it_reads_at_any_offset_like_the_plain_file(reads: list[tuple[int, int]]) -> None:
    packed, plain = ZstdFile(io.BytesIO(coded(CONTENT))), io.BytesIO(CONTENT)
    assert packed.seek(0, os.SEEK_END) == len(CONTENT)
    for offset, count in reads:
        packed.seek(offset)
        plain.seek(offset)
        assert packed.read(count) == plain.read(count)
        assert packed.tell() == plain.tell()


def test_a_new_blob_takes_the_place_of_a_packed_one(blobs: PackableBlobs) -> None:
    blobs.pack(ID)
    blobs.put(ID, lambda file: file.write(b"new"))
    assert files(blobs) == {blob_name(ID)}
    with blobs.open(ID) as file:
        assert file.read() == b"new"


def test_where_a_process_died_both_are_one_blob(blobs: PackableBlobs) -> None:
    blobs.packed.put(ID, lambda file: file.write(coded(CONTENT)))
    assert list(blobs.ids()) == [ID] and blobs.size(ID) == len(CONTENT)
    assert blobs.pack(ID)
    assert files(blobs) == {blob_name(ID, suffix=PACKED_SUFFIX)}
    assert blobs.remove(ID) and not blobs.remove(ID) and files(blobs) == set()


def test_what_gains_nothing_stays_plain(blobs: PackableBlobs) -> None:
    blobs.put(OTHER, lambda file: file.write(random.Random(1).randbytes(5000)))
    assert not blobs.pack(OTHER) and not blobs.pack("ef" * 32)
    assert blob_name(OTHER) in files(blobs)
    for action in (blobs.open, blobs.size, blobs.quarantine):
        with pytest.raises(ArtifactNotFound):
            action("ef" * 32)


def test_what_does_not_read_back_stays_plain(blobs: PackableBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xkv_artifacts.packable_blobs.sha256", lambda file: "0" * 64)
    with pytest.raises(CorruptArtifact, match="does not read back"):
        blobs.pack(ID)
    assert files(blobs) == {blob_name(ID)}


def unknown_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


BAD = {
    "no frame": b"not a frame at all",
    "empty": b"",
    "a size that is not stated": unknown_size(CONTENT),
    "a bomb": zstandard.ZstdCompressor().compress(bytes(1 << 26)),
    "a huge window": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    ).compress(random.Random(0).randbytes(9 << 20)),
    "a flipped bit": bytes([*coded(CONTENT)[:9000], coded(CONTENT)[9000] ^ 1, *coded(CONTENT)[9001:]]),
    "a wrong checksum": coded(CONTENT)[:-1] + bytes([coded(CONTENT)[-1] ^ 1]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_lies_or_is_damaged_is_corrupt(name: str) -> None:
    with pytest.raises(CorruptArtifact):
        ZstdFile(io.BytesIO(BAD[name])).read()


def test_no_more_is_decoded_than_was_stated() -> None:
    """The frame states 10 bytes fewer than it holds."""
    frame = bytearray(coded(bytes(1000)))
    place = bytes(frame).index((1000 - 256).to_bytes(2, "little"))
    frame[place : place + 2] = (990 - 256).to_bytes(2, "little")
    try:
        found = ZstdFile(io.BytesIO(bytes(frame))).read()
    except CorruptArtifact:
        return
    assert len(found) <= 990


def test_a_truncated_file_gives_fewer_bytes_or_is_corrupt() -> None:
    try:
        found = ZstdFile(io.BytesIO(coded(CONTENT)[:-5000])).read()
    except CorruptArtifact:
        return
    assert found == CONTENT[: len(found)] and len(found) < len(CONTENT)


def test_how_much_a_file_may_state() -> None:
    assert may_state(zstd_file.FREE_BYTES, 0) and not may_state(zstd_file.FREE_BYTES + 1, 0)
    assert may_state(8_000_000, 1_000_000) and not may_state(10_000_000, 1_000_000)
