"""What was deleted, or has ended, answers nobody new: neither its prefix in memory nor a tail behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from asking import Asked, StillRates, generated, paced, until
from talking import DOCUMENT, SELECTION, Talker

from xkv_artifacts.embedded import EmbeddedRedis
from xkv_artifacts.store import ArtifactStore
from xkv_service.engine import catalog_upkeep
from xkv_service.engine.engine import Engine
from xkv_service.engine.messages import Miss, PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.stored_tails import StoredTails
from xkv_service.sessions.settings import GenerationSettings

SETTINGS = EngineSettings(max_running=4, step_tokens=64, prefill_tokens=64, selection=SELECTION)
NONE = Miss("no_artifact", "no stored prefix begins like this prompt")
AWAY = Miss("unavailable", "the store of prefixes does not answer")


class Served:
    """An engine over a store of its own with one prefix, asked about it once."""

    def __init__(self, talker: Talker, store: ArtifactStore) -> None:
        self.talker, self.store = talker, store
        source = talker.published(store).source
        assert source is not None and source.artifact_id is not None
        self.artifact, tokens = source.artifact_id, talker.factors.tokens
        self.match = PrefixMatch(self.artifact, tokens)
        fingerprint = talker.loaded.identity.fingerprint
        rates = StillRates(10.0)  # seconds a token: whatever can be loaded is
        self.pool = PrefixPool(talker.model, store, SELECTION, 2**24, fingerprint=fingerprint, rates=rates)
        self.stored = StoredTails(talker.loaded, store.tails, self.pool, SETTINGS)
        self.engine = Engine(talker.loaded, SETTINGS, self.pool, self.stored)
        self.first = Asked(self.engine, self.prompt("Where does it end?"), match=self.match).wait()
        assert self.first.started.artifact_id == self.artifact

    def prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": f"{DOCUMENT}\n\n{question}"}]
        ids: list[int] = self.talker.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def going_on(self) -> list[int]:
        """The conversation's next prompt: the kept tail holds most of it."""
        return [*self.first.request.token_ids, *self.first.tokens, *self.prompt("And then?")[-30:]]

    def computed(self, prompt: list[int], **fields: Any) -> Asked:
        """Ask, and see that it is answered as the model alone answers it, from no artifact."""
        asked = Asked(self.engine, prompt, **fields).wait()
        assert asked.started.artifact_id is None and asked.started.prefix_tokens == 0
        assert asked.tokens == generated(self.talker, prompt)
        return asked

    def close(self) -> None:
        self.engine.close()
        self.stored.close()
        self.pool.close()


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store"), patience_s=0) as opened:
        yield opened


@pytest.fixture
def served(talker: Talker, own_store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(catalog_upkeep, "EVERY_S", 0.1)
    made = Served(talker, own_store)
    yield made
    made.close()


@pytest.mark.parametrize("ends", ["deleted", "expired", "deleted by somebody else"])
def test_a_prefix_that_is_gone_leaves_memory_with_its_conversations(served: Served, ends: str) -> None:
    until(lambda: served.engine.state().kept_tails == 1)
    if ends == "expired":
        served.store.set_ttl(served.artifact, 0.2)
    elif ends == "deleted":
        served.store.remove(served.artifact)
    else:
        with ArtifactStore.open(served.store.blobs.url) as other:
            other.remove(served.artifact)
    until(lambda: not served.engine.state().kept_tails and not served.pool.state().nbytes)
    assert served.pool.gone == frozenset() and served.pool.state().holds == {}
    # Nor does one whose lookup was older, or whose store did not answer, get it.
    served.computed(served.going_on())
    served.computed(served.prompt("Why?"), miss=AWAY)
    late = served.computed(served.prompt("Who?"), match=served.match, namespace="late")
    assert late.started.miss is not None and late.started.miss.reason == "evicted"
    assert "stored" not in served.stored.counters(), "its conversation was written to the store"


def test_an_answer_that_runs_comes_to_its_end_and_is_not_kept(served: Served) -> None:
    long = served.prompt("Say more. " * 3)
    settings = GenerationSettings(max_new_tokens=400)
    with paced(served.talker.model):  # some 20 s
        running = Asked(served.engine, long, match=served.match, settings=settings)
        until(lambda: served.engine.state().running == 1)
        served.store.remove(served.artifact)
        until(lambda: not served.pool.state().prefixes)
        ended_already = running.ended.is_set()
    late = served.computed(served.prompt("Why?"), match=served.match)
    assert late.started.miss is not None and late.started.miss.reason == "evicted"
    assert running.wait().tokens == generated(served.talker, long, prefix=True, most=400)
    assert not ended_already, "it showed nothing: the answer was over before"
    until(lambda: not served.pool.state().nbytes)


def test_a_lookup_that_finds_none_is_believed_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.pool._upkeep, "ask", lambda ids: None)  # as in the seconds between
    served.store.remove(served.artifact)
    asked = served.computed(served.going_on(), miss=NONE)
    assert asked.started.miss == NONE


def test_a_lookup_that_finds_less_than_a_conversation_stands_behind_is_believed(served: Served) -> None:
    asked = served.computed(served.going_on(), match=PrefixMatch("5" * 64, 40))
    assert asked.started.miss is not None and asked.started.miss.reason == "evicted"


def test_stored_tails_behind_what_no_lookup_finds_stay_where_they_are(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.stored.rates, "load_is_faster", lambda *_, **__: True)
    until(lambda: served.engine.state().kept_tails == 1)
    served.engine._tails.clear()
    until(lambda: served.stored.counters().get("stored") == 1)
    monkeypatch.setattr(served.pool._upkeep, "ask", lambda ids: None)
    assert served.computed(served.going_on(), miss=NONE).started.miss == NONE


def test_a_redis_that_is_away_leaves_memory_as_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(EmbeddedRedis, "ensure", lambda self: None)
    monkeypatch.setattr(redis.Redis, "execute_command", refuse)
    monkeypatch.setattr(redis.client.Pipeline, "execute", refuse)
    time.sleep(0.5)
    asked = Asked(served.engine, served.going_on(), miss=AWAY).wait()
    assert asked.started.artifact_id == served.artifact and asked.started.miss is None
    assert asked.tokens == generated(served.talker, served.going_on(), prefix=True)


def test_a_redis_that_lost_its_catalog_takes_nothing_out_of_memory(served: Served) -> None:
    served.store.catalog.clear()
    assert served.store.standings([served.artifact]) == {served.artifact: "kept"}
    time.sleep(0.5)
    assert served.pool.state().prefixes == (served.artifact,) and not served.pool.gone
    assert Asked(served.engine, served.prompt("Why?"), match=served.match).wait().started.artifact_id


def test_a_prefix_that_is_made_again_serves_again(served: Served) -> None:
    served.store.remove(served.artifact)
    until(lambda: not served.pool.state().nbytes)
    served.talker.published(served.store)
    asked = Asked(served.engine, served.prompt("Why?"), match=served.match).wait()
    assert asked.started.artifact_id == served.artifact and asked.started.miss is None


def test_how_artifacts_stand(served: Served) -> None:
    store, artifact = served.store, served.artifact
    assert store.standings([artifact, "0" * 64]) == {artifact: "kept", "0" * 64: "gone"}
    store.pin(artifact)
    store.set_ttl(artifact, 0.01)
    time.sleep(0.1)
    assert store.standings([artifact]) == {artifact: "pinned"}
    store.unpin(artifact)
    assert store.standings([artifact]) == {artifact: "gone"}
