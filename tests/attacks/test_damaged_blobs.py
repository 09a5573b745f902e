"""Every damage to a blob is found, on load and by verify, and a load never returns a tensor of a bad blob.

200 single-bit flips and 50 truncations over the blobs of a store, at random places, each on its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.errors import ArtifactNotFound, CorruptArtifact
from xkv_artifacts.store import ArtifactStore

FLIPS = 200
TRUNCATIONS = 50


def attack(store: ArtifactStore, artifact_id: str, damage: Callable[[bytes], bytes]) -> None:
    """Damage one blob, see that it is found in both ways, and put it back."""
    path = Path(store.blobs.url) / blob_name(artifact_id)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    (check,) = store.verify([artifact_id])
    assert check.fault is not None
    with pytest.raises(CorruptArtifact, match=artifact_id):
        store.load(artifact_id)
    with pytest.raises(ArtifactNotFound):
        store.load(artifact_id)
    assert not path.exists()
    assert artifact_id not in {entry.id for entry in store.entries()}
    path.write_bytes(whole)
    assert store.get(artifact_id) is not None


def flipped(whole: bytes, bit: int) -> bytes:
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def test_random_bit_flips_are_all_found(store: ArtifactStore) -> None:
    source = random.Random(20261122)
    ids = list(store.blobs.ids())
    for _ in range(FLIPS):
        artifact_id = source.choice(ids)
        bit = source.randrange(8 * store.blobs.size(artifact_id))
        attack(store, artifact_id, lambda whole, bit=bit: flipped(whole, bit))  # type: ignore[misc]
    assert all(check.fault is None for check in store.verify())


def test_random_truncations_are_all_found(store: ArtifactStore) -> None:
    source = random.Random(1)
    ids = list(store.blobs.ids())
    for _ in range(TRUNCATIONS):
        artifact_id = source.choice(ids)
        size = source.randrange(store.blobs.size(artifact_id))
        attack(store, artifact_id, lambda whole, size=size: whole[:size])  # type: ignore[misc]
    assert all(check.fault is None for check in store.verify())


def test_every_single_bit_of_a_header_counts(store: ArtifactStore) -> None:
    import io

    from xkv_artifacts.format import verify

    artifact_id = next(iter(store.blobs.ids()))
    with store.blobs.open(artifact_id) as file:
        whole = file.read()
    header = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * header):
        with pytest.raises(CorruptArtifact):
            verify(io.BytesIO(flipped(whole, bit)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole + b"\0",
        lambda whole: whole[1:],
        lambda whole: bytes(len(whole)),
        lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        lambda whole: whole[:4096] + whole[4097:] + b"x",
        lambda whole: whole + whole,
    ],
)
def test_other_damage_is_found(store: ArtifactStore, damage: Callable[[bytes], bytes]) -> None:
    for artifact_id in store.blobs.ids():
        attack(store, artifact_id, damage)
