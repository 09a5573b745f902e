"""Many requests at once are each answered as the model answers it alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from asking import SHORT, Asked, generated, prompt_of, until
from talking import SELECTION, Talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.engine.engine import Engine
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.messages import Failed, Finished, PrefixMatch
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.settings import EngineSettings
from xkv_service.sessions.sampling import Sampler, choose
from xkv_service.sessions.settings import GenerationSettings

SETTINGS = EngineSettings(max_running=6, step_tokens=16, prefill_tokens=64, selection=SELECTION)
SLOW_MODEL = 10.0  # seconds a token: whatever can be loaded is


@pytest.fixture(scope="module")
def artifact(talker: Talker, store: ArtifactStore) -> str:
    source = talker.published(store).source
    assert source is not None and source.artifact_id is not None
    return source.artifact_id


@pytest.fixture
def pool(talker: Talker, store: ArtifactStore) -> Iterator[PrefixPool]:
    made = PrefixPool(
        talker.model,
        store,
        SELECTION,
        2**24,
        fingerprint=talker.loaded.identity.fingerprint,
        rates=LoadingRates(SLOW_MODEL),
    )
    yield made
    made.close()


@pytest.fixture
def engine(talker: Talker, pool: PrefixPool) -> Iterator[Engine]:
    with Engine(talker.loaded, SETTINGS, pool) as made:
        yield made


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "deepseek_v3"])
def test_prompts_of_many_lengths_at_once(talkers: Callable[[str], Talker], family: str) -> None:
    talker = talkers(family)
    prompts = [prompt_of(talker, "x" * size, document=False) for size in (1, 90, 7, 40, 3, 200, 11, 60)]
    with Engine(talker.loaded, SETTINGS) as engine:
        asked = [Asked(engine, prompt) for prompt in prompts]
        for one, prompt in zip(asked, prompts, strict=True):
            assert one.wait().tokens == generated(talker, prompt)
            assert one.started.prompt_tokens == len(prompt)


def test_prefixes_come_from_factors_beside_prompts_that_do_not(
    talker: Talker, engine: Engine, artifact: str
) -> None:
    match = PrefixMatch(artifact, talker.factors.tokens)
    jobs = []
    for number in range(14):
        with_document = number % 3 != 0
        prompt = prompt_of(talker, f"{number}: where does it end?" * (1 + number % 4), document=with_document)
        jobs.append((prompt, with_document, Asked(engine, prompt, match=match if with_document else None)))
    for prompt, with_document, asked in jobs:
        assert asked.wait().tokens == generated(talker, prompt, prefix=with_document)
        assert asked.started.artifact_id == (artifact if with_document else None)
        if with_document:
            assert asked.started.prefix_tokens == match.tokens
    assert engine.state().counters["prefixes_loads"] == 1


def test_a_shorter_match_uses_the_beginning_of_the_prefix(
    talker: Talker, engine: Engine, artifact: str
) -> None:
    asked = Asked(engine, prompt_of(talker, "?"), match=PrefixMatch(artifact, 40)).wait()
    assert isinstance(asked.end, Finished)
    assert asked.started.prefix_tokens == asked.started.cached_tokens == 40


def test_a_conversation_goes_on_without_an_id(talker: Talker, engine: Engine, artifact: str) -> None:
    match = PrefixMatch(artifact, talker.factors.tokens)
    first = prompt_of(talker, "Where does it end? " * 5)
    one = Asked(engine, first, match=match).wait()
    longer = [*first, *one.tokens, *prompt_of(talker, "And then?", document=False)]
    two = Asked(engine, longer, match=match).wait()
    held = len(first) + len(one.tokens) - 1
    assert two.started.cached_tokens == held and two.started.tail_tokens == held - match.tokens
    assert two.started.artifact_id == artifact
    assert two.tokens == generated(talker, longer, prefix=True)
    three = Asked(engine, longer, match=match, namespace="other").wait()
    assert three.started.cached_tokens == match.tokens
    assert three.tokens == two.tokens


def test_a_prompt_that_was_asked_before_leaves_one_token_to_compute(talker: Talker, engine: Engine) -> None:
    prompt = prompt_of(talker, "y" * 100, document=False)
    first, second = (Asked(engine, prompt).wait() for _ in range(2))
    assert first.started.cached_tokens == 0
    assert second.started.cached_tokens == len(prompt) - 1
    assert second.tokens == first.tokens == generated(talker, prompt)


@pytest.mark.parametrize("loading", [(False, False), (True, False), (False, True)])
def test_what_loads_take_of_the_processors_is_not_the_cost_of_a_prefill(
    talker: Talker,
    engine: Engine,
    pool: PrefixPool,
    loading: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as they make it look, the next prompts would wait for theirs: those at its beginning or end."""
    told = cycle(loading)
    monkeypatch.setattr(PrefixPool, "loading", property(lambda _: next(told)))
    hook = talker.model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    try:
        Asked(engine, prompt_of(talker, "z" * 300, document=False)).wait()
    finally:
        hook.remove()
    assert engine.state().counters["step_seconds"] > 4 * 0.3
    assert (pool.rates.prefill_s(64) < 0.25) is any(loading)


def test_tails_leave_when_the_budget_is_full(talker: Talker, pool: PrefixPool, artifact: str) -> None:
    with Engine(talker.loaded, replace(SETTINGS, tail_bytes=600_000), pool) as engine:
        match = PrefixMatch(artifact, talker.factors.tokens)
        for number in range(12):
            Asked(engine, prompt_of(talker, f"{number}" * 90), match=match).wait()
            state = engine.state()
            assert state.tail_bytes <= 600_000
        until(lambda: engine.state().running == 0)
        until(lambda: pool.state().holds.get(artifact) == engine.state().kept_tails > 0)
        assert engine.state().kept_tails < 12
    assert not pool.state().holds.get(artifact)


def test_settings_are_obeyed(talker: Talker, engine: Engine) -> None:
    prompt = prompt_of(talker, "z" * 70, document=False)
    whole = Asked(engine, prompt, settings=GenerationSettings(max_new_tokens=30)).wait()
    assert isinstance(whole.end, Finished)
    stop = whole.text[3:5]
    stopped = Asked(engine, prompt, settings=GenerationSettings(max_new_tokens=30, stop=(stop,))).wait()
    assert isinstance(stopped.end, Finished) and stopped.end.finish == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    warm = GenerationSettings(max_new_tokens=12, temperature=1.5, seed=7)
    one, two = (Asked(engine, prompt, settings=warm).wait() for _ in range(2))
    other = Asked(engine, prompt, settings=replace(warm, seed=8)).wait()
    assert one.tokens == two.tokens != other.tokens


def test_log_probabilities_are_of_the_tokens_told(talker: Talker, engine: Engine) -> None:
    asked = Asked(engine, prompt_of(talker, "w" * 70, document=False), top_logprobs=3).wait()
    found = [one for event in asked.events if hasattr(event, "logprobs") for one in event.logprobs]
    assert [one.token_id for one in found] == asked.tokens
    for one in found:
        assert len(one.top) == 3 and one.top[0] == (one.token_id, pytest.approx(one.logprob))
        assert one.logprob <= 0


def test_cancelled_requests_leave_at_once_and_the_others_go_on(talker: Talker, engine: Engine) -> None:
    """Running ones and waiting ones, in the middle of a step: in the next one others have their places."""
    prompts = [prompt_of(talker, str(number) * 20, document=False) for number in range(10)]
    sent, seen, cancelled = threading.Event(), [], []

    def look(*_: object) -> None:
        assert sent.wait(60.0)
        state = engine.state()
        seen.append((state.running, state.waiting))
        if not cancelled and all(one.events for one in asked[:6]):
            cancelled.append(len(seen))
            for one in asked[1:8]:
                one.cancel()

    with talker.model.register_forward_pre_hook(look):
        asked = [
            Asked(engine, ids, settings=replace(SHORT, max_new_tokens=40), namespace=str(number))
            for number, ids in enumerate(prompts)
        ]
        sent.set()
        for one in asked:
            one.wait()
    assert [one.end.finish for one in asked[1:8]] == ["cancelled"] * 7
    assert seen[cancelled[0] - 1 : cancelled[0] + 1] == [(6, 4), (3, 0)]
    for number in (0, 8, 9):
        assert asked[number].tokens == generated(talker, prompts[number], most=40)


def test_a_request_that_takes_too_long_fails(talker: Talker, engine: Engine) -> None:
    slow = GenerationSettings(max_new_tokens=900)
    asked = Asked(engine, prompt_of(talker, "v", document=False), settings=slow, timeout_s=0.05).wait()
    assert isinstance(asked.end, Failed) and asked.end.kind == "timeout"
    until(lambda: engine.state().running == 0)


@pytest.mark.parametrize("ids", [[], [-1], [10**6], [5] * 2000])
def test_prompts_that_no_model_can_run_are_refused(engine: Engine, ids: list[int]) -> None:
    end = Asked(engine, ids).wait().end
    assert isinstance(end, Failed) and end.kind == "invalid"


def test_an_artifact_that_is_gone_is_computed_instead(talker: Talker, engine: Engine) -> None:
    """One that is damaged: test_head_start.py, test_other_conversations.py."""
    prompt = prompt_of(talker, "Where?" * 12)
    gone = Asked(engine, prompt, match=PrefixMatch("0" * 64, 40)).wait()
    assert gone.started.miss is not None and gone.started.miss.reason == "evicted"
    assert gone.tokens == generated(talker, prompt)


def test_closing_ends_everything(talker: Talker) -> None:
    engine = Engine(talker.loaded, SETTINGS)
    long = GenerationSettings(max_new_tokens=900)
    asked = [Asked(engine, prompt_of(talker, str(n), document=False), settings=long) for n in range(12)]
    engine.close()
    assert all(one.wait().end for one in asked)
    late = Asked(engine, [5, 6]).wait()
    assert isinstance(late.end, Failed) and late.end.kind == "overloaded"


def test_a_model_that_fails_on_one_sequence_answers_the_others(
    talker: Talker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = talker.model.model.embed_tokens.forward

    def fail(ids):  # type: ignore[no-untyped-def]
        if (ids == 200).any():
            raise RuntimeError("no memory")
        return forward(ids)

    monkeypatch.setattr(talker.model.model.embed_tokens, "forward", fail)
    prompt = prompt_of(talker, "u" * 30, document=False)
    asked = [Asked(engine, prompt), Asked(engine, [7, 200, 7]), Asked(engine, prompt, namespace="b")]
    assert isinstance(asked[1].wait().end, Failed) and asked[1].end.kind == "internal"
    assert asked[0].wait().tokens == asked[2].wait().tokens == generated(talker, prompt)


def test_a_choice_that_fails_ends_one_answer_alone(
    talker: Talker, engine: Engine, artifact: str, pool: PrefixPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(samplers: list[Sampler], logits: torch.Tensor) -> list[int]:
        spoilt = [[float("nan") if one.settings.top_p < 1 else 1.0] for one in samplers]
        return choose(samplers, logits * torch.tensor(spoilt))

    monkeypatch.setattr("xkv_service.engine.engine.choose", bad)
    match = PrefixMatch(artifact, talker.factors.tokens)
    prompt, nucleus = prompt_of(talker, "n" * 70), replace(SHORT, temperature=1.0, top_p=0.5)
    good, failing = Asked(engine, prompt, match=match), Asked(engine, prompt, match=match, settings=nucleus)
    assert isinstance(failing.wait().end, Failed) and failing.end.kind == "internal"
    assert good.wait().tokens == generated(talker, prompt, prefix=True)
    assert engine.alive
    until(lambda: engine.state().running == 0)
    assert pool.state().holds[artifact] == engine.state().kept_tails == 1


def test_the_smallest_temperature_is_that_of_the_likeliest(talker: Talker, engine: Engine) -> None:
    prompt = prompt_of(talker, "t" * 70, document=False)
    greedy = Asked(engine, prompt).wait()
    coldest = Asked(engine, prompt, settings=replace(SHORT, temperature=5e-324)).wait()
    assert coldest.tokens == greedy.tokens


def test_any_traffic_is_answered_right(talker: Talker, engine: Engine, artifact: str) -> None:
    """Conversations of random turns, side by side, some of them cancelled."""
    dice, match = random.Random(3), PrefixMatch(artifact, talker.factors.tokens)
    talks = [
        (prompt_of(talker, f"{n} " * dice.randint(1, 40), document=n % 2 == 0), n % 2 == 0) for n in range(8)
    ]
    for _ in range(3):
        asked = [
            Asked(engine, ids, match=match if prefix else None, namespace=dice.choice("ab"))
            for ids, prefix in talks
        ]
        if dice.random() < 0.5:
            time.sleep(dice.random() * 0.05)
            asked[dice.randrange(8)].cancel()
        following = []
        for (ids, prefix), one in zip(talks, asked, strict=True):
            tokens = one.wait().tokens
            expected = generated(talker, ids, prefix=prefix)
            assert tokens == (expected if one.end.finish != "cancelled" else expected[: len(tokens)])
            more = prompt_of(talker, "?" * dice.randint(1, 30), document=False)
            following.append(([*ids, *tokens, *more][:900], prefix))
        talks = following
    assert engine.state().counters["cached_tokens"] > 0


def test_events_come_in_order(talker: Talker, engine: Engine) -> None:
    events = Asked(engine, prompt_of(talker, "t" * 40, document=False)).wait().events
    kinds = [type(event).__name__ for event in events]
    assert kinds[0] == "Started" and kinds[-1] == "Finished" and set(kinds[1:-1]) <= {"Delta"}
    assert sum(event.tokens for event in events if hasattr(event, "tokens")) == len(events[-1].token_ids)
    assert SHORT.max_new_tokens >= len(events[-1].token_ids)
