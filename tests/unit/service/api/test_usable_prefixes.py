"""A prefix that is ready says whether this server serves prompts from it, as its lookups decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from engines import PacedBackend, paced_backend
from rivers import DOCUMENT, SETTINGS, publish
from serving import serve

from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.api.prefix_maker import PrefixMaker
from xkv_service.api.stored_prefixes import StoredPrefixes
from xkv_service.modeling.models import LoadedModel


@dataclass(frozen=True)
class Kept:
    """A store with an artifact that differs from the exact cache, and what serves from it."""

    store: ArtifactStore
    maker: PrefixMaker
    backend: PacedBackend
    rough: PrefixManifest

    def asked(self, model: ServedModel, **settings: Any) -> tuple[dict[str, Any], str | None]:
        """The artifact as a server with these settings tells of it, and why its chats miss it."""
        chosen = replace(SETTINGS, **settings)
        finder = PrefixFinder(self.store, model.identity, chosen)
        prefixes = StoredPrefixes(self.store, self.maker)
        app = create_app(model, self.backend, finder=finder, prefixes=prefixes, settings=chosen)
        with serve(app) as served, served.http() as http:
            one = http.get(f"/v1/prefixes/{self.rough.id}").json()
            for listing in (http.get("/v1/prefixes").json()["data"], http.get("/status").json()["prefixes"]):
                assert one in listing
            return one, _miss(http, self.rough.id)


def _miss(http: httpx.Client, prefix_id: str) -> str | None:
    messages = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere?"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1, "prefix_id": prefix_id}
    miss = http.post("/v1/chat/completions", json=body).json()["xkv"]["miss"]
    return miss and str(miss["reason"])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, loaded: LoadedModel) -> Iterator[Kept]:
    with ArtifactStore.open(str(tmp_path_factory.mktemp("kept"))) as store:
        rough = publish(store, loaded, DOCUMENT, rank=1)
        assert rough.fidelity.top1_agreement < 1
        maker = PrefixMaker(store, loaded)
        try:
            with paced_backend(loaded, store) as backend:
                yield Kept(store, maker, backend, rough)
        finally:
            maker.close()


def test_one_that_is_served_from(kept: Kept, served_model: ServedModel) -> None:
    one, miss = kept.asked(served_model)
    assert (one["usable"], one["unusable_reason"], miss) == (True, None, None)


def test_one_that_is_not_faithful_enough(kept: Kept, served_model: ServedModel) -> None:
    one, miss = kept.asked(served_model, min_fidelity=1.0)
    assert (one["status"], one["usable"], miss) == ("ready", False, "low_fidelity")
    assert one["unusable_reason"] == (
        f"its fidelity {kept.rough.fidelity.top1_agreement:.3f} is below the 1 that this server asks for: "
        "have it made with a lower ratio"
    )


def test_one_that_is_too_short(kept: Kept, served_model: ServedModel) -> None:
    one, miss = kept.asked(served_model, min_match_tokens=5000)
    assert (one["usable"], miss) == (False, "no_artifact")
    assert one["unusable_reason"] == f"it has {kept.rough.tokens} tokens, fewer than the 5000 that pay"


def test_one_of_another_model(kept: Kept, served_model: ServedModel) -> None:
    identity = served_model.identity.model_copy(update={"fingerprint": "5" * 64})
    one, miss = kept.asked(replace(served_model, identity=identity))
    assert (one["usable"], miss) == (False, "other_model")
    assert one["unusable_reason"].startswith("it was made with another model")


def test_one_that_is_not_ready_yet_does_not_know(kept: Kept, served_model: ServedModel) -> None:
    prefixes = StoredPrefixes(kept.store, kept.maker)
    app = create_app(served_model, kept.backend, prefixes=prefixes, settings=SETTINGS)
    with serve(app) as served, served.http() as http:
        made = http.post("/v1/prefixes", json={"document": f"Not yet. {DOCUMENT}", "ratio": 2}).json()
    assert (made["status"], made["usable"], made["unusable_reason"]) == ("queued", None, None)
