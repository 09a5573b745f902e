"""A prompt whose prefix is stored for another model is told so, and a key hears of what it may read alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from engines import paced_backend
from rivers import DOCUMENT, SETTINGS, key, publish
from serving import Served, serve

from xkv_artifacts.errors import StoreError
from xkv_artifacts.manifest import ModelIdentity, PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_service.api import matching
from xkv_service.api.app import create_app
from xkv_service.api.keys import KeyRing
from xkv_service.api.matching import Found, PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.engine.messages import Miss
from xkv_service.modeling.models import LoadedModel

MADE_WITH = "another model (tiny: another dtype (float32, not bfloat16), other weights)"


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), patience_s=0) as opened:
        yield opened


@pytest.fixture
def made(shelf: ArtifactStore, loaded: LoadedModel) -> PrefixManifest:
    return publish(shelf, loaded, DOCUMENT, "mine")


@pytest.fixture
def prompt(shelf: ArtifactStore, made: PrefixManifest) -> list[int]:
    return [*shelf.load(made.id, ("tokens",))[1]["tokens"].tolist(), 70]


@pytest.fixture
def finder(shelf: ArtifactStore, other_revision: ModelIdentity) -> PrefixFinder:
    return PrefixFinder(shelf, other_revision, SETTINGS)


def find(finder: PrefixFinder, prompt: list[int], namespace: str = "mine") -> Found:
    return asyncio.run(finder.find(prompt, namespace))


def reason(found: Found) -> str:
    match, miss = found
    assert match is None and miss is not None
    return miss.reason


def test_what_is_stored_for_another_model_is_told(
    finder: PrefixFinder, made: PrefixManifest, prompt: list[int]
) -> None:
    for asked, shared in ((prompt, made.tokens), ([*prompt[:80], 70, 70], 80)):
        words = f"shares {shared} of its {made.tokens} tokens with the prompt, but was made with {MADE_WITH}"
        expected = Miss("other_model", f"artifact {made.id[:12]} {words}")
        assert find(finder, asked) == (None, expected)


def test_a_few_tokens_are_no_prefix_of_another_model(
    finder: PrefixFinder, shelf: ArtifactStore, other_revision: ModelIdentity, prompt: list[int]
) -> None:
    assert reason(find(finder, [*prompt[:63], 70, 70])) == "no_artifact"
    assert reason(find(finder, prompt[:64])) == "no_artifact"  # one of them must be computed
    assert reason(find(finder, [70, 71])) == "no_artifact"
    choosy = PrefixFinder(shelf, other_revision, replace(SETTINGS, min_match_tokens=100))
    assert reason(find(choosy, [*prompt[:99], 70, 70])) == "no_artifact"
    assert reason(find(choosy, [*prompt[:101], 70, 70])) == "other_model"


def test_what_would_not_be_served_anyway_is_no_reason(
    shelf: ArtifactStore, loaded: LoadedModel, other_revision: ModelIdentity, prompt: list[int]
) -> None:
    rough = publish(shelf, loaded, f"Rough. {DOCUMENT}", "mine", rank=1)
    ids = shelf.load(rough.id, ("tokens",))[1]["tokens"].tolist()
    strict = PrefixFinder(shelf, other_revision, replace(SETTINGS, min_fidelity=1.0))
    assert rough.fidelity.top1_agreement < 1
    assert reason(find(strict, [*ids, 70])) == "no_artifact"


def test_an_artifact_of_this_model_serves_as_ever(
    shelf: ArtifactStore, loaded: LoadedModel, finder: PrefixFinder, prompt: list[int]
) -> None:
    assert reason(find(finder, prompt)) == "other_model"
    own = PrefixFinder(shelf, loaded.identity, SETTINGS)
    assert find(own, prompt)[0] is not None


def test_other_namespaces_are_not_heard_of(
    shelf: ArtifactStore, loaded: LoadedModel, finder: PrefixFinder, prompt: list[int]
) -> None:
    assert reason(find(finder, prompt, "yours")) == "no_artifact"
    publish(shelf, loaded, DOCUMENT, "public")
    assert reason(find(finder, prompt, "yours")) == "other_model"


def test_what_cannot_be_read_for_it_keeps_nobody_from_its_prefix(
    finder: PrefixFinder, made: PrefixManifest, prompt: list[int],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Its blob is a folder: reading it is an error of the machine's, not of the artifact's."""
    blob = tmp_path / "store" / "prefixes" / made.id[:2] / f"{made.id}.safetensors"
    blob.unlink()
    blob.mkdir()
    with ArtifactStore.open(str(tmp_path / "store"), patience_s=0) as fresh:
        with pytest.raises(StoreError):
            fresh.manifest(made.id)
        theirs = PrefixFinder(fresh, finder._model, SETTINGS)
        for _ in range(3):
            assert reason(find(theirs, prompt)) == "no_artifact"
            assert theirs._breaker.allows()


def test_what_hangs_for_it_is_not_waited_for(
    finder: PrefixFinder, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody else asked about meanwhile, and afterwards it is told again."""
    monkeypatch.setattr(matching, "_EXPLAIN_S", 0.05)
    let_go, real, asked = Event(), finder._store.lookup_other_models, []

    def hang(*arguments: Any) -> Any:
        asked.append(arguments)
        let_go.wait(30)
        return real(*arguments)

    monkeypatch.setattr(finder._store, "lookup_other_models", hang)
    for _ in range(3):
        assert reason(find(finder, prompt)) == "no_artifact"
    assert len(asked) == 1 and finder._breaker.allows()
    let_go.set()
    monkeypatch.setattr(matching, "_EXPLAIN_S", 30.0)
    deadline = time.monotonic() + 30
    while reason(find(finder, prompt)) != "other_model":
        assert time.monotonic() < deadline


@pytest.fixture
def served(
    shelf: ArtifactStore,
    loaded: LoadedModel,
    served_model: ServedModel,
    other_revision: ModelIdentity,
    finder: PrefixFinder,
) -> Iterator[Served]:
    """A server of the other revision, with a key for each of two namespaces and one for its metrics."""
    model = replace(served_model, identity=other_revision)
    keys = KeyRing((key("mine"), key("yours"), key("ops", operator=True)))
    with paced_backend(loaded, shelf) as backend:
        app = create_app(model, backend, finder=finder, keys=keys, settings=SETTINGS)
        with serve(app) as running:
            yield running


def chat(http: httpx.Client) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{DOCUMENT}\n\nWhere?"}]
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1})
    assert answer.status_code == 200
    told: dict[str, Any] = answer.json()["xkv"]
    assert told["artifact"] is None and answer.headers["x-xkv-miss"] == told["miss"]["reason"]
    return told["miss"]  # type: ignore[no-any-return]


def test_answers_and_metrics_say_so(served: Served, made: PrefixManifest) -> None:
    with served.http("sk-mine") as mine, served.http("sk-yours") as yours, served.http("sk-ops") as ops:
        miss = chat(mine)
        assert miss["reason"] == "other_model"
        assert made.id[:12] in miss["detail"] and miss["detail"].endswith(MADE_WITH)
        assert chat(yours) == {"reason": "no_artifact", "detail": "no stored prefix begins like this prompt"}
        counted = ops.get("/metrics").text
    for line in ('{reason="other_model"} 1.0', '{reason="no_artifact"} 1.0'):
        assert f"xkv_prefix_misses_total{line}" in counted
