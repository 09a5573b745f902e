"""What answers that go on from an earlier turn say of stored prefixes: which one served, or why none did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import PacedBackend, paced_backend, wait_until
from rivers import DOCUMENT, SETTINGS, publish
from serving import serve

from xkv_artifacts.store import ArtifactStore
from xkv_service.api.app import create_app
from xkv_service.api.matching import PrefixFinder
from xkv_service.api.model import ServedModel
from xkv_service.modeling.models import LoadedModel

Asking = tuple[httpx.Client, PacedBackend]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), patience_s=0) as opened:
        yield opened


@pytest.fixture
def asking(store: ArtifactStore, loaded: LoadedModel, served_model: ServedModel) -> Iterator[Asking]:
    finder = PrefixFinder(store, loaded.identity, SETTINGS)
    with paced_backend(loaded, store) as backend:
        app = create_app(served_model, backend, finder=finder, settings=SETTINGS)
        with serve(app) as running, running.http() as client:
            yield client, backend


def ask(asking: Asking, **options: Any) -> httpx.Response:
    """The same conversation each time, with a question of more than 64 tokens; its answer is kept before this
    returns."""
    http, backend = asking
    messages = [{"role": "user", "content": f"{DOCUMENT}\n\n{'Where does it end? ' * 10}"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, **options}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: not backend.busy)
    return answer


def test_a_turn_that_was_computed_serves_on_and_the_answer_says_so(
    asking: Asking, store: ArtifactStore, loaded: LoadedModel
) -> None:
    """As when a prefix is damaged, computed, made again, and the conversation goes on."""
    first = ask(asking).json()["xkv"]
    assert (first["artifact"], first["miss"]["reason"]) == (None, "no_artifact")
    made = publish(store, loaded, DOCUMENT)
    answer = ask(asking)
    xkv = answer.json()["xkv"]
    assert xkv["artifact"] is None and xkv["prefix_tokens"] == 0 and xkv["cached_tokens"] > made.tokens
    assert xkv["miss"] == {
        "reason": "kept_tail",
        "detail": f"an earlier turn holds {xkv['cached_tokens']} tokens, computed without artifact "
        f"{made.id[:12]}, which has {made.tokens} of them",
    }
    assert answer.headers["x-xkv-miss"] == "kept_tail" and "x-xkv-artifact" not in answer.headers
    http, backend = asking
    assert 'xkv_prefix_misses_total{reason="kept_tail"} 1.0' in http.get("/metrics").text
    assert http.get("/status").json()["traffic"]["misses"] == {"no_artifact": 1, "kept_tail": 1}
    assert backend.state.counters["miss_kept_tail"] == 1
    assert "kept_tail" in http.get("/openapi.json").text


def test_the_prefix_that_is_named_serves_whatever_is_kept_behind_another(
    asking: Asking, store: ArtifactStore, loaded: LoadedModel
) -> None:
    made = [publish(store, loaded, DOCUMENT, rank=rank) for rank in (24, 16)]
    for one in (*made, made[0]):
        xkv = ask(asking, prefix_id=one.id).json()["xkv"]
        assert (xkv["artifact"], xkv["miss"]) == (one.id, None)
    again = ask(asking, prefix_id=made[0].id).json()["xkv"]
    assert again["cached_tokens"] > made[0].tokens, "a tail behind the one that is named may serve"


def test_a_turn_that_was_computed_does_not_serve_a_prefix_that_is_named(
    asking: Asking, store: ArtifactStore, loaded: LoadedModel
) -> None:
    ask(asking)
    made = publish(store, loaded, DOCUMENT)
    xkv = ask(asking, prefix_id=made.id).json()["xkv"]
    assert (xkv["artifact"], xkv["miss"]) == (made.id, None)
