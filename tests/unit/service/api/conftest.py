"""A tiny model behind the API, a store with two prefixes, and servers over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import PacedBackend, paced_backend
from rivers import DOCUMENT, SETTINGS, publish
from serving import Served, serve

from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api import matching
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.engine.settings import EngineSettings
from xkv_service.modeling.models import LoadedModel, load_model


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts hear of other models however long it takes on a busy machine."""
    monkeypatch.setattr(matching, "_EXPLAIN_S", 30.0)


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def served_model(loaded: LoadedModel) -> ServedModel:
    return ServedModel.of(loaded, ("gpt-4o",))


@pytest.fixture(scope="session")
def other_revision(loaded: LoadedModel) -> ModelIdentity:
    """The model with other weights and in another dtype, as its files would say."""
    parts = loaded.identity.parts
    assert parts is not None
    update = {
        "fingerprint": "e" * 64,
        "dtype": "bfloat16",
        "parts": parts.model_copy(update={"weights": "e" * 64}),
    }
    return loaded.identity.model_copy(update=update)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path_factory.mktemp("store")), patience_s=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def stored(store: ArtifactStore, loaded: LoadedModel) -> PrefixManifest:
    """The artifact of `DOCUMENT` in the namespace "default"."""
    return publish(store, loaded, DOCUMENT)


@pytest.fixture(scope="module")
def finder(store: ArtifactStore, loaded: LoadedModel) -> PrefixFinder:
    return PrefixFinder(store, loaded.identity, SETTINGS)


@pytest.fixture(scope="module")
def backend(loaded: LoadedModel, store: ArtifactStore) -> Iterator[PacedBackend]:
    with paced_backend(loaded, store) as running:
        yield running


@pytest.fixture
def room() -> int:
    """Sequences that `slow` runs at once; as many may wait."""
    return 2


@pytest.fixture
def slow(loaded: LoadedModel, store: ArtifactStore, room: int) -> Iterator[PacedBackend]:
    """Takes a while for each token."""
    with paced_backend(loaded, store, EngineSettings(max_running=room)) as backend:
        backend.step_s = 0.03
        yield backend


@pytest.fixture(scope="module")
def served(
    served_model: ServedModel, backend: PacedBackend, finder: PrefixFinder, stored: PrefixManifest
) -> Iterator[Served]:
    """A server without keys, over the store with `stored` in it."""
    app = create_app(served_model, backend, finder=finder, keys=KeyRing(), settings=SETTINGS)
    with serve(app) as running:
        yield running
