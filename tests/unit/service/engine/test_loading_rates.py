"""Figures follow what is measured, odd ones aside, and the faster way is taken."""

from __future__ import annotations

import time
from random import Random

import pytest
from families import tiny_model

from xkv_service.engine import loading_rates
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.robust_line import RobustLine


def test_a_line_is_found_among_odd_ones() -> None:
    line, random = RobustLine([(0.0, 50.0)]), Random(0)
    for number in range(40):
        x = random.uniform(1, 100)
        line.observe(x, 100 * x if number % 5 == 0 else 3 + 2 * x + random.uniform(-0.1, 0.1))
    assert line(50) == pytest.approx(103, rel=0.02)


def test_a_line_says_little_far_from_what_was_seen_and_nothing_below_zero() -> None:
    line = RobustLine([(1.0, 2.0), (2.0, 3.0)])
    assert line(4) == pytest.approx(5) == line(1000)
    falling = RobustLine([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)])
    assert falling(3) == pytest.approx(2)
    steep = RobustLine([(1.0, 1.0), (2.0, 4.0), (3.0, 7.0)])  # would meet zero before 0
    assert steep.fit[0] == 0 and steep.fit[1] > 0


def test_what_was_never_observed_does_not_make_the_others_alike() -> None:
    line = RobustLine([(0.0, 0.02), (64e6, 0.34)])
    for _ in range(4):
        line.observe(7e6, 0.84)
        line.observe(10e6, 1.2)
    assert line(9e6) == pytest.approx(1.08, rel=0.02)


def test_a_prefill_slows_down_with_its_position() -> None:
    rates = LoadingRates(1e-3)
    for _ in range(4):
        for start in range(0, 4096, 512):
            rates.prefilled(start, 512, 512 * (1e-4 + 1e-7 * (start + 256)))
    assert rates.prefill_s(4096) == pytest.approx(4096 * (1e-4 + 1e-7 * 2048), rel=0.02)
    assert rates.prefill_s(512, start=3584) == pytest.approx(512 * (1e-4 + 1e-7 * 3840), rel=0.02)
    assert rates.deadline_s(4096) == rates.prefill_s(4096)


def test_many_short_prompts_do_not_make_a_long_one_look_cheap() -> None:
    """Each forward takes 10 ms besides, so that their tokens cost less the more there are."""
    rates, random = LoadingRates(1e-3), Random(0)

    def prefill(start: int, tokens: int) -> None:
        rates.prefilled(start, tokens, 0.01 + tokens * (1e-4 + 3.5e-8 * (start + tokens / 2)))

    for start in range(0, 32768, 2048):
        prefill(start, 2048)
    true = sum(0.01 + 2048 * (1e-4 + 3.5e-8 * (start + 1024)) for start in range(0, 32768, 2048))
    for count in (26, 28, 30):
        for _ in range(count):
            prefill(0, random.randint(40, 250))
        assert rates.prefill_s(32768) > 0.8 * true
        for start in range(0, 32768, 2048):
            prefill(start, 2048)


def test_short_chunks_say_nothing() -> None:
    rates = LoadingRates(1e-3)
    for _ in range(20):
        rates.prefilled(0, 4, 1.0)
    assert rates.prefill_s(100) == pytest.approx(0.1)


def test_the_faster_way_is_taken() -> None:
    rates = LoadingRates(1e-4)
    assert rates.decide(1000) == "load"  # nothing is known of loads: try
    for _ in range(8):
        rates.loaded(10_000_000, 1000, 0.05 + 1.0)
        rates.loaded(20_000_000, 2000, 0.05 + 2.0)
    assert rates.load_s(10_000_000) == pytest.approx(1.05, rel=0.05)
    assert rates.decide(1000) == "prefill" == rates.decide(1000, 10_000_000)
    assert rates.decide(1000, 10_000) == "load"
    assert rates.decide(100, 10_000) == "prefill"  # a load's fixed time is more than that
    for _ in range(32):
        rates.loaded(10_000_000, 1000, 0.01)
    assert rates.decide(1000) == "load"


def test_figures_are_those_that_decide() -> None:
    rates = LoadingRates(1e-4)
    for start in range(0, 32_000, 1000):
        rates.prefilled(start, 1000, 1000 * (1e-4 + 1e-8 * (start + 500)))
        rates.loaded(1000 * start, 1000, 0.02 + 1e-9 * 1000 * start)
    costs = rates.figures()
    expected = {"prefill_token": 1e-4, "prefill_token_position": 1e-8, "load": 0.02, "load_byte": 1e-9}
    assert costs == pytest.approx(expected, rel=0.05)
    tokens = 4000
    told = tokens * (costs["prefill_token"] + costs["prefill_token_position"] * tokens / 2)
    assert rates.prefill_s(tokens) == pytest.approx(told)


def test_it_starts_with_a_measurement() -> None:
    rates = LoadingRates.measured(tiny_model("llama"))
    assert 0 < rates.prefill_s(1000) < 10


def test_what_others_take_of_the_processor_is_not_measured() -> None:
    """A starting server shares it with many processes, and first prompts would wait for a store so long."""
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *given: time.sleep(0.3))
    assert LoadingRates.measured(model).prefill_s(128) < 0.25


def test_what_less_of_an_artifact_takes_is_hoped_until_it_was_seen() -> None:
    rates = LoadingRates(1.0 / 1000)
    for _ in range(8):
        rates.loaded(10_000_000, 1000, 1.2)
    assert rates.decide(1000, 10_000_000) == "prefill"
    assert rates.load_s(7_000_000) == pytest.approx(rates.load_s(10_000_000), rel=0.02)  # of one size
    assert rates.part_in_time(1000, 7_000_000, 10_000_000)
    assert not rates.part_in_time(1000, 9_000_000, 10_000_000)
    rates.loaded(7_000_000, 1000, 1.15, whole_nbytes=10_000_000)  # it is no bytes that take the time
    assert not rates.part_in_time(1000, 7_000_000, 10_000_000)
    assert rates.decide(1000) == "prefill"  # as many bytes a token as the artifact has, not its part


def test_what_it_takes_is_measured() -> None:
    rates = LoadingRates(1.0 / 1000)
    for _ in range(8):
        rates.loaded(10_000_000, 1000, 1.2)
        rates.loaded(7_000_000, 1000, 0.84, whole_nbytes=10_000_000)
    assert rates.part_in_time(1000, 8_000_000, 10_000_000)
    assert not rates.part_in_time(1000, 9_000_000, 10_000_000)


def test_loads_that_scatter_around_a_prefill_are_not_waited_for() -> None:
    """On the whole they take a little less: but who waits in vain waits for nothing, and then computes."""
    rates, random = LoadingRates(1e-3), Random(0)
    vain = 0
    for _ in range(100):
        seconds = 0.95 * random.lognormvariate(0, 0.2)
        vain += rates.decide(1000, 3_000_000) == "load" and seconds > 1
        rates.loaded(3_000_000, 1000, seconds)
    assert rates.load_s(3_000_000) < rates.prefill_s(1000)
    assert vain <= 5


def test_loads_that_scatter_far_below_a_prefill_are_waited_for() -> None:
    rates, random = LoadingRates(1e-3), Random(0)
    for number in range(100):
        assert rates.decide(1000, 3_000_000) == "load"
        late = number % 8 == 7  # one that is odd changes nothing
        rates.loaded(3_000_000, 1000, 5.0 if late else 0.3 * random.lognormvariate(0, 0.3))


def test_a_store_that_becomes_slow_and_quick_again_is_believed_soon() -> None:
    rates = LoadingRates(1e-3)
    for seconds, way in ((0.2, "load"), (1.5, "prefill"), (0.2, "load")):
        for _ in range(8):
            rates.loaded(3_000_000, 1000, seconds)
        assert rates.decide(1000, 3_000_000) == way


def test_what_is_waited_for_in_vain_counts_before_it_ends_and_once() -> None:
    rates = LoadingRates(1e-3)
    rates.waited_in_vain()
    assert rates.decide(1000) == "prefill" == rates.decide(1000, 3_000_000)
    assert not rates.part_in_time(1000, 2_000_000, 3_000_000)
    rates.loaded(3_000_000, 1000, 1.2, noted=True)
    assert rates.decide(1000, 3_000_000) == "prefill"
    assert rates.part_in_time(1000, 2_000_000, 3_000_000)
    for _ in range(7):
        rates.loaded(3_000_000, 1000, 0.1)
    assert rates.decide(1000, 3_000_000) == "load"
    for _ in range(5):
        rates.waited_in_vain()
    assert rates.decide(1000, 3_000_000) == "prefill"


def test_the_first_load_says_what_the_next_takes() -> None:
    """What was believed before anything was loaded was a hope."""
    rates = LoadingRates(1e-3)
    rates.loaded(3_000_000, 1000, 1.2)
    assert rates.decide(1000, 3_000_000) == "prefill" == rates.decide(1000)
    assert rates.part_in_time(1000, 2_000_000, 3_000_000)


def test_what_was_long_ago_says_nothing_of_how_loads_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing could be loaded since, nothing else would ever tell."""
    rates = LoadingRates(1e-3)
    rates.loaded(3_000_000, 1000, 0.1)
    for _ in range(8):
        rates.waited_in_vain()
    assert rates.decide(1000, 3_000_000) == "prefill"
    monkeypatch.setattr(loading_rates, "BELIEVED_S", -1.0)
    assert rates.decide(1000, 3_000_000) == "load"


def test_loads_before_it_are_waited_for_too() -> None:
    rates = LoadingRates(1e-3)
    for _ in range(4):
        rates.loaded(3_000_000, 1000, 0.4)
    assert [rates.decide(1000, 3_000_000, rounds) for rounds in (1, 2, 3)] == ["load", "load", "prefill"]


def test_everything_is_computed_where_the_rest_takes_far_longer_behind_a_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = LoadingRates(1e-3)
    assert not rates.everything_is_faster(2000, 4000, 2000)  # nothing is known of it
    rates.prefilled(2000, 100, 100.0, 2000)  # a question: it says what a forward costs
    assert not rates.everything_is_faster(2000, 4000, 2000)
    for tokens in (200, 400, 800, 1600):
        rates.prefilled(2000, tokens, tokens * (2e-3 + 4e-6 * tokens / 2), 2000)
    assert rates.everything_is_faster(2000, 4000, 2000)  # 4 s against 12
    assert rates.everything_is_faster(1500, 3500, 1500)  # about as long a prefix
    assert not rates.everything_is_faster(2000, 2500, 2000)  # 2.5 s against 1.5
    assert not rates.everything_is_faster(2000, 2064, 2000)
    assert not rates.everything_is_faster(64_000, 70_000, 64_000)  # nothing is known of these
    monkeypatch.setattr(loading_rates, "BELIEVED_S", -1.0)
    assert not rates.everything_is_faster(2000, 4000, 2000)  # nor of what was long ago
    rates.prefilled(2000, 200, 0.2, 2000)
    monkeypatch.setattr(loading_rates, "BELIEVED_S", 300.0)
    assert not rates.everything_is_faster(2000, 4000, 2000)  # it is forgotten


def test_what_tokens_cost_behind_a_prefix_is_believed_until_it_is_seen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = LoadingRates(1e-3)
    rates.prefilled(2000, 200, 200 * 5e-3, prefix=2000)
    assert rates.prefill_s(200, 2000, prefix=2000) > 2 * rates.prefill_s(200, 2000)
    assert rates.prefill_s(200, 1000, prefix=1000) == rates.prefill_s(200, 1000)  # another length
    monkeypatch.setattr(loading_rates, "BELIEVED_S", -1.0)
    assert rates.prefill_s(200, 2000, prefix=2000) > 2 * rates.prefill_s(200, 2000)


def test_one_long_rest_does_not_make_short_ones_look_slow() -> None:
    rates = LoadingRates(1e-3)
    rates.prefilled(2000, 2000, 2000 * 6e-3, 2000)
    assert rates.everything_is_faster(2000, 4000, 2000)
    assert not rates.everything_is_faster(2000, 2500, 2000)
