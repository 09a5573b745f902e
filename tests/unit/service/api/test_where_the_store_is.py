"""Where the store is stays on the server: no answer, no header says it, whatever is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import paced_backend, wait_until
from rivers import DOCUMENT, SETTINGS, publish
from serving import serve

from xkv_artifacts.errors import (
    ArtifactNotFound,
    CatalogError,
    CatalogUnavailable,
    CorruptArtifact,
    InvalidLimits,
    MissingBlob,
    MissingTensor,
    StoreError,
    UnsupportedFormat,
)
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.engine.prefix_loading import PrefixLoading
from xkv_service.errors import InvalidSpec, ModelMismatch
from xkv_service.modeling.models import LoadedModel

WHERE = "s3://kv.example/store"
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": f"{DOCUMENT}\n\nWhere does it end?"}],
    "max_tokens": 2,
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), patience_s=0) as opened:
        yield opened


@pytest.fixture
def stored(store: ArtifactStore, loaded: LoadedModel) -> PrefixManifest:
    return publish(store, loaded, DOCUMENT)


@pytest.fixture
def http(
    store: ArtifactStore, stored: PrefixManifest, loaded: LoadedModel, served_model: ServedModel
) -> Iterator[httpx.Client]:
    """A server whose engine has loaded nothing yet."""
    finder = PrefixFinder(store, loaded.identity, SETTINGS)
    maker = PrefixMaker(store, loaded, ratio=2.0)
    try:
        with paced_backend(loaded, store) as backend:
            prefixes = StoredPrefixes(store, maker)
            app = create_app(served_model, backend, finder=finder, prefixes=prefixes, settings=SETTINGS)
            with serve(app) as running, running.http() as client:
                yield client
    finally:
        maker.close()


def told(answer: httpx.Response, store: ArtifactStore) -> Any:
    """The answer's JSON, in which, and in the headers, nobody finds the store."""
    everything = f"{answer.text} {answer.headers}"
    for where in (WHERE, store.blobs.url, str(Path(store.blobs.url).parent), "quarantine"):
        assert where not in everything, everything
    return answer.json()


def test_a_damaged_blob(
    http: httpx.Client, store: ArtifactStore, stored: PrefixManifest, caplog: Any
) -> None:
    (blob,) = Path(store.blobs.url).glob(f"*/*/{stored.id}.safetensors")
    content = bytearray(blob.read_bytes())
    content[-100] ^= 1
    blob.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        answer = http.post("/v1/chat/completions", json=CHAT)
    miss = told(answer, store)["xkv"]["miss"]
    assert miss == {"reason": "corrupt", "detail": f"artifact {stored.id[:12]} is damaged"}
    assert "quarantine" in caplog.text and "checksum" in caplog.text, "the log has all of it"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ArtifactNotFound(f"no artifact in {WHERE}"), "evicted"),
        (MissingBlob(f"its file is gone from {WHERE}"), "missing"),
        (CorruptArtifact(f"moved to {WHERE}/quarantine"), "corrupt"),
        (MissingTensor(f"{WHERE} has no tensor"), "corrupt"),
        (StoreError(f"cannot read {WHERE}"), "unavailable"),
        (CatalogUnavailable(f"{WHERE} does not answer"), "unavailable"),
        (CatalogError(f"{WHERE} answers nonsense"), "unavailable"),
        (OSError(5, "input/output error", f"{WHERE}/blob"), "unavailable"),
        (ModelMismatch(f"{WHERE} is of another model"), "other_model"),
        (UnsupportedFormat(f"{WHERE} is of version 9"), "no_artifact"),
        (InvalidSpec(f"{WHERE} has no sketches"), "no_artifact"),
        (MemoryError(f"{WHERE} is too large"), "no_room"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_load_that_fails(
    http: httpx.Client,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    error: Exception,
    reason: str,
    stream: bool,
) -> None:
    def bind(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(PrefixLoading, "bind", bind)
    with caplog.at_level(logging.WARNING):
        answer = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert WHERE not in f"{answer.text} {answer.headers}" and answer.status_code == 200
    assert answer.headers["x-xkv-miss"] == reason and f'"reason":"{reason}"' in answer.text
    assert WHERE in caplog.text, "the log has all of it"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreError(f"cannot write {WHERE}"), 503),
        (InvalidLimits(f"{WHERE}/limits.json: budget: not a size"), 503),
        (CorruptArtifact(f"moved to {WHERE}/quarantine"), 500),
        (UnsupportedFormat(f"{WHERE} is of version 9"), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_prefix_that_cannot_be_made(
    http: httpx.Client, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """Neither the refusal of a prefix says it, nor the error of one that failed later."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    body = {"document": "Another river, which nobody named yet. " * 4}
    monkeypatch.setattr(ArtifactStore, "publish", fail)
    made = told(http.post("/v1/prefixes", json=body), store)
    address = f"/v1/prefixes/{made['id']}"
    wait_until(lambda: http.get(address).json()["status"] == "failed")
    assert told(http.get(address), store)["error"]
    monkeypatch.setattr(ArtifactStore, "check_room", fail)
    refused = http.post("/v1/prefixes", json=body)
    assert told(refused, store)["error"]["message"] and refused.status_code == status
