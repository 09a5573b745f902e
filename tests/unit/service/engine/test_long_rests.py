"""A prompt with much behind its prefix is computed whole where that is known to be faster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Asked, StillRates, generated, prompt_of, until
from talking import SELECTION, Talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings

SETTINGS = EngineSettings(max_running=4, step_tokens=64, prefill_tokens=256, selection=SELECTION)
LONG = "And what does it say of the other ones, again and again? " * 6


class Served:
    """An engine that has an artifact in memory."""

    def __init__(self, talker: Talker, store: ArtifactStore, rates: LoadingRates) -> None:
        source = talker.published(store).source
        assert source is not None and source.artifact_id is not None
        self.talker, self.rates = talker, rates
        self.match = PrefixMatch(source.artifact_id, talker.factors.tokens)
        fingerprint = talker.loaded.identity.fingerprint
        self.pool = PrefixPool(talker.model, store, SELECTION, 2**24, fingerprint=fingerprint, rates=rates)
        self.engine = Engine(talker.loaded, SETTINGS, self.pool)
        self.ask("Where?")

    def ask(self, question: str) -> Asked:
        return Asked(self.engine, prompt_of(self.talker, question), match=self.match).wait()

    def behind(self, seconds_per_token: float) -> None:
        """Let the engine know what a token behind factors costs."""
        prefix = self.match.tokens
        LoadingRates.prefilled(self.rates, prefix, 200, 200 * seconds_per_token, prefix)

    def close(self) -> None:
        self.engine.close()
        self.pool.close()


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with ArtifactStore.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def served(talker: Talker, own_store: ArtifactStore) -> Iterator[Served]:
    made = Served(talker, own_store, StillRates(1.0))
    yield made
    made.close()


def test_it_is_computed_whole(served: Served) -> None:
    """The first conversation, which is kept, shares some tokens of the template behind the prefix."""
    until(lambda: served.engine.state().kept_tails == 1)
    served.behind(100.0)
    asked = served.ask(LONG)
    miss = asked.started.miss
    assert asked.started.artifact_id is None and asked.started.cached_tokens == 0
    assert miss is not None and miss.reason == "slow_load" and "computed faster than" in miss.detail
    assert asked.tokens == generated(served.talker, list(asked.request.token_ids))
    until(lambda: served.engine.state().running == 0)
    counters = served.engine.state().counters
    assert (counters["miss_slow_load"], counters["from_artifact"], counters["without_artifact"]) == (1, 1, 1)
    assert sum(served.pool.state().holds.values()) == 1  # by the first conversation


def test_its_next_turn_goes_on_from_that(served: Served) -> None:
    served.behind(100.0)
    one = served.ask(LONG)
    until(lambda: served.engine.state().kept_tails == 2)
    ids = [*one.request.token_ids, *one.tokens, *prompt_of(served.talker, LONG, document=False)]
    two = Asked(served.engine, ids, match=served.match).wait()
    assert two.started.cached_tokens >= len(one.request.token_ids)
    assert two.tokens == generated(served.talker, ids)


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_so_it_is_only_where_that_is_known(served: Served, seconds: float | None) -> None:
    if seconds is not None:
        served.behind(seconds)
    asked = served.ask(LONG)
    assert asked.started.artifact_id == served.match.artifact_id and asked.started.miss is None
    assert asked.tokens == generated(served.talker, list(asked.request.token_ids), prefix=True)


def test_a_question_uses_the_prefix(served: Served) -> None:
    served.behind(100.0)
    asked = served.ask("Who?")
    assert asked.started.artifact_id == served.match.artifact_id and asked.started.miss is None


def test_a_conversation_keeps_what_it_holds(served: Served) -> None:
    one = served.ask("Who was it? " * 8)
    until(lambda: served.engine.state().kept_tails >= 2)
    served.behind(100.0)
    ids = [*one.request.token_ids, *one.tokens, *prompt_of(served.talker, LONG, document=False)]
    two = Asked(served.engine, ids, match=served.match).wait()
    assert two.started.artifact_id == served.match.artifact_id
    assert two.started.cached_tokens >= len(one.request.token_ids)


def test_a_prefix_that_is_named_is_used(served: Served) -> None:
    served.behind(100.0)
    ids = prompt_of(served.talker, LONG)
    asked = Asked(served.engine, ids, match=served.match, prefix_id=served.match.artifact_id).wait()
    assert asked.started.artifact_id == served.match.artifact_id and asked.started.miss is None


def test_what_would_fill_the_memory_for_conversations_is_not(served: Served) -> None:
    served.behind(100.0)
    served.engine._exact_bytes = served.engine.settings.tail_bytes // 400
    assert served.ask(LONG).started.artifact_id == served.match.artifact_id


def test_what_another_conversation_computed_is_not_computed_again(served: Served) -> None:
    served.behind(100.0)
    one = served.ask(LONG)
    until(lambda: served.engine.state().kept_tails == 2)
    two = served.ask("What else? " + LONG)
    assert one.started.artifact_id is None and two.started.artifact_id is None
    assert two.started.cached_tokens >= served.match.tokens
    assert two.tokens == generated(served.talker, list(two.request.token_ids))


def test_it_is_learned_from_a_long_rest(talker: Talker, own_store: ArtifactStore) -> None:
    served = Served(talker, own_store, LoadingRates(1.0))
    try:
        assert not served.rates._behind  # a question says nothing
        rest = len(served.ask(LONG).request.token_ids) - served.match.tokens
        ((length, (_, line)),) = served.rates._behind.items()
        assert length == served.match.tokens.bit_length()
        assert all(0 <= distance < rest for distance, _ in line._seen)
    finally:
        served.close()
