"""Lookups through the store: prompts that are arrays, and artifacts that another process publishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from artifact_samples import FINGERPRINT, sample
from redis_server import RedisServer

from xkv_artifacts.errors import InvalidKey
from xkv_artifacts.store import ArtifactStore, Match, Rebuild


@pytest.fixture
def stores(tmp_path: Path, redis_server: RedisServer) -> Iterator[tuple[ArtifactStore, ArtifactStore]]:
    """One store, opened twice."""
    url = str(tmp_path / "store")
    with ArtifactStore.open(url, redis_server.url) as one, ArtifactStore.open(url, redis_server.url) as other:
        yield one, other


def publish(store: ArtifactStore, length: int) -> str:
    return store.publish(*sample(range(length))).id


def test_a_prompt_may_be_an_array(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    store, _ = stores
    expected = Match(publish(store, 100), 100)
    for prompt in (numpy.arange(150), torch.arange(150), torch.arange(150, dtype=torch.int32)):
        assert store.lookup(FINGERPRINT, "default", prompt) == expected
    with pytest.raises(InvalidKey, match="shape"):
        store.lookup(FINGERPRINT, "default", torch.arange(150)[None])


def test_a_lookup_tells_what_it_had_to_read(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    store, other = stores
    stored = publish(store, 100)
    first, second = (other.lookup(FINGERPRINT, "default", range(150)) for _ in range(2))
    assert first is not None and first.manifest == store.manifest(stored)
    assert second == first and second.manifest is None


def test_what_others_publish_longer_or_rebuild_is_found(stores: tuple[ArtifactStore, ArtifactStore]) -> None:
    store, other = stores

    def found() -> Match | None:
        return store.lookup(FINGERPRINT, "default", range(20_000))

    assert found() is None
    short = publish(other, 100)
    assert found() == Match(short, 100)
    long = publish(other, 300)
    assert found() == Match(long, 300)
    other.remove(long)
    assert other.rebuild() == Rebuild(1, ())
    assert found() == Match(short, 100)
    longest = publish(other, 9000)
    assert found() == Match(longest, 9000)
