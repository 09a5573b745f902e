"""Stores with small artifacts in them, to be damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from artifact_samples import sample

from xkv_artifacts.store import ArtifactStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    """Three artifacts of different sizes, catalogued in an embedded Redis."""
    folder: Path = tmp_path_factory.mktemp("attacked")
    with ArtifactStore.open(str(folder)) as store:
        for length in (1, 100, 700):
            store.publish(*sample(range(length)))
        yield store
