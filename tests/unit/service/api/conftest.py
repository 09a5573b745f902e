"""A tiny model behind the API, a store with two prefixes, and servers over them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from one_at_a_time import OneAtATime
from serving import Served, serve

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import DocumentRef, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service import CompressionSpec, compress
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.settings import APISettings
from xkv_service.modeling.models import LoadedModel, load_model
from xkv_service.modeling.prompts import render_prefix

DOCUMENT = "The river Ume rises in the hills, flows by 3 towns and ends in the sea. " * 2
SETTINGS = APISettings(min_fidelity=0.0)


def publish(
    store: ArtifactStore, loaded: LoadedModel, document: str, namespace: str = "default"
) -> PrefixManifest:
    """Compress a document as `xkv precompute` would, and publish it."""
    ids = render_prefix(loaded.tokenizer, document)
    factors = compress(loaded.model, ids, CompressionSpec(rank_k=24, rank_v=24))
    fields = factors.manifest_fields()
    manifest = PrefixManifest(
        id=artifact_id(loaded.identity.fingerprint, namespace, ids, fields["spec"]),
        model=loaded.identity,
        namespace=namespace,
        document=DocumentRef(uri="river.txt", sha256="0" * 64),
        created=datetime.now(timezone.utc),
        **fields,
    )
    return store.publish(manifest, factors.to_tensors())


@pytest.fixture(scope="session")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def served_model(loaded: LoadedModel) -> ServedModel:
    return ServedModel.of(loaded, ("gpt-4o",))


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
    return PrefixFinder(store, loaded.identity.fingerprint, SETTINGS)


@pytest.fixture(scope="module")
def backend(loaded: LoadedModel, store: ArtifactStore) -> OneAtATime:
    return OneAtATime(loaded, store)


@pytest.fixture(scope="module")
def served(
    served_model: ServedModel, backend: OneAtATime, finder: PrefixFinder, stored: PrefixManifest
) -> Iterator[Served]:
    """A server without keys, over the store with `stored` in it."""
    app = create_app(served_model, backend, finder=finder, keys=KeyRing(), settings=SETTINGS)
    with serve(app) as running:
        yield running
