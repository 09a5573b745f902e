"""A document that was first asked about without its artifact: new conversations begin with the artifact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Asked, StillRates, generated, prompt_of, until
from talking import SELECTION, Talker

from xkv_artifacts.blobs import blob_name
from xkv_artifacts.store import ArtifactStore
from xkv_service.engine.engine import Engine
from xkv_service.engine.messages import PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.stored_tails import StoredTails

SETTINGS = EngineSettings(max_running=4, step_tokens=64, prefill_tokens=64, selection=SELECTION)


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


class Served:
    """An engine that was asked about a document when it had no artifact; it has one now."""

    def __init__(self, talker: Talker, store: ArtifactStore, rate: float = 10.0) -> None:
        source = talker.published(store).source
        assert source is not None and source.artifact_id is not None
        self.talker, self.match = talker, PrefixMatch(source.artifact_id, talker.factors.tokens)
        fingerprint, rates = talker.loaded.identity.fingerprint, StillRates(rate)
        self.pool = PrefixPool(talker.model, store, SELECTION, 2**24, fingerprint=fingerprint, rates=rates)
        self.stored = StoredTails(talker.loaded, store.tails, self.pool, SETTINGS)
        self.engine = Engine(talker.loaded, SETTINGS, self.pool, self.stored)
        self.first = Asked(self.engine, prompt_of(talker, "Where?")).wait()
        assert self.first.started.cached_tokens == 0

    def another(self, question: str) -> Asked:
        """Another conversation about the document."""
        asked = prompt_of(self.talker, question)
        return Asked(self.engine, asked, match=self.match).wait()

    def tail_bytes(self, tails: int) -> int:
        """Of conversations between their turns, once there are so many."""
        until(lambda: self.engine.state().kept_tails == tails)
        return self.engine.state().tail_bytes

    def close(self) -> None:
        self.engine.close()
        self.stored.close()
        self.pool.close()


@pytest.fixture
def served(talker: Talker, own_store: ArtifactStore) -> Iterator[Served]:
    made = Served(talker, own_store)
    yield made
    made.close()


def test_another_conversation_begins_with_the_artifact(served: Served) -> None:
    exact = served.tail_bytes(1)
    for question in ("Who?", "When does it end?", "Why?"):
        asked = served.another(question)
        assert asked.started.artifact_id == served.match.artifact_id and asked.started.miss is None
        assert asked.tokens == generated(served.talker, list(asked.request.token_ids), prefix=True)
    assert served.tail_bytes(4) < 2 * exact, "each holds the document once more"


def test_so_it_does_where_the_other_one_is_in_the_store(served: Served) -> None:
    served.tail_bytes(1)
    served.engine._tails.clear()
    until(lambda: served.stored.counters().get("stored") == 1)
    asked = served.another("Who?")
    assert asked.started.artifact_id == served.match.artifact_id
    assert served.stored.counters().get("loaded", 0) == 0


def test_the_same_conversation_goes_on_from_its_own_turn(served: Served) -> None:
    held = [*served.first.request.token_ids, *served.first.tokens]
    asked = Asked(
        served.engine, [*held, *prompt_of(served.talker, "And then?", document=False)], match=served.match
    ).wait()
    assert asked.started.cached_tokens == len(held) - 1 and asked.started.artifact_id is None
    assert asked.started.miss is not None and asked.started.miss.reason == "kept_tail"
    assert asked.tokens == generated(served.talker, list(asked.request.token_ids))


def test_what_goes_far_beyond_the_artifact_is_shared(served: Served) -> None:
    """A prompt that is sent again with another end, say."""
    long = "again and again " * 12
    exact = Asked(served.engine, prompt_of(served.talker, f"{long}no")).wait()
    assert exact.started.artifact_id is None
    two = served.another(long + "yes")
    assert two.started.artifact_id is None and two.started.cached_tokens > served.match.tokens + 64


@pytest.mark.parametrize("why", ["corrupt", "slow_load"])
def test_where_the_artifact_cannot_be_had_the_other_conversation_serves(
    talker: Talker, own_store: ArtifactStore, why: str
) -> None:
    served = Served(talker, own_store, rate=10.0 if why == "corrupt" else 1e-9)
    try:
        if why == "corrupt":
            blob = Path(own_store.blobs.url) / blob_name(served.match.artifact_id)
            content = bytearray(blob.read_bytes())
            content[-100] ^= 1
            blob.write_bytes(content)
        asked = served.another("Who?")
        assert asked.started.artifact_id is None and asked.started.cached_tokens >= served.match.tokens
        assert asked.started.miss is not None and asked.started.miss.reason == why
        assert asked.tokens == generated(talker, list(asked.request.token_ids))
    finally:
        served.close()
