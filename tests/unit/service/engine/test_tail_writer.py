"""The queue of tails on their way to the store is bounded, and its end is too."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from artifact_samples import tail_sample

from xkv_service.engine import tail_rates
from xkv_service.engine.loading_rates import LoadingRates
from xkv_service.engine.tail_rates import TailRates
from xkv_service.engine.tail_writer import LeavingTail, TailWriter


def tail(nbytes: int) -> LeavingTail:
    return LeavingTail(tail_sample([1] * 10)[0], "default", nbytes, {})


class Slow:
    """Writes when it is let."""

    def __init__(self) -> None:
        self.let, self.begun, self.written = threading.Semaphore(0), list[int](), list[int]()

    def __call__(self, one: LeavingTail) -> None:
        self.begun.append(one.nbytes)
        assert self.let.acquire(timeout=20)
        if one.nbytes == 13:
            raise RuntimeError("no disk")
        self.written.append(one.nbytes)


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def writer(slow: Slow) -> Iterator[TailWriter]:
    made = TailWriter(slow, 100)
    yield made
    slow.let.release(100)
    made.close(5)


def test_a_full_queue_takes_no_more(writer: TailWriter, slow: Slow) -> None:
    assert writer.put(tail(60)) and writer.put(tail(40))
    assert not writer.put(tail(1))
    slow.let.release()
    until(lambda: slow.written == [60])
    assert writer.put(tail(59)) and not writer.put(tail(59))


def test_one_that_is_larger_than_the_queue_is_taken_alone(writer: TailWriter, slow: Slow) -> None:
    assert writer.put(tail(500)) and not writer.put(tail(1))
    slow.let.release()
    until(lambda: slow.written == [500])
    assert writer.put(tail(1)) and not writer.put(tail(500))


def test_one_that_fails_does_not_stop_the_others(writer: TailWriter, slow: Slow) -> None:
    slow.let.release(2)
    assert writer.put(tail(13)) and writer.put(tail(7))
    until(lambda: slow.written == [7])


def test_at_the_end_it_may_wait_for_room(writer: TailWriter, slow: Slow) -> None:
    assert writer.put(tail(90))
    writer.wait_for_room(120)
    threading.Timer(0.2, slow.let.release).start()
    assert writer.put(tail(80))
    began = time.monotonic()
    writer.wait_for_room(0.2)
    assert not writer.put(tail(80)) and 0.1 < time.monotonic() - began < 60


def test_closing_waits_for_what_is_in_the_queue_but_not_for_ever(slow: Slow) -> None:
    writer = TailWriter(slow, 100)
    assert writer.put(tail(1)) and writer.put(tail(2)) and writer.put(tail(3))
    slow.let.release()
    until(lambda: slow.begun == [1, 2])
    assert writer.close(0.3) == 2  # one is being written, one waits
    assert not writer.put(tail(1))
    slow.let.release(2)
    other = TailWriter(slow, 100)
    slow.let.release(2)
    assert other.put(tail(4)) and other.close(60) == 0 and 4 in slow.written


def test_computing_behind_factors_is_learned_apart() -> None:
    prefill = LoadingRates(0.001)
    rates = TailRates(prefill)
    assert rates.compute_s(100, 1000, prefix=1000) == rates.compute_s(100, 1000, prefix=0)
    for start in (1000, 1200, 1400, 1600):
        prefill.prefilled(start, 200, 200 * 0.004, prefix=1000)
    assert rates.compute_s(100, 1000, prefix=1000) == pytest.approx(0.4, rel=0.2)
    assert rates.compute_s(100, 1000, prefix=0) == pytest.approx(0.1)
    assert rates.load_is_faster(1_000_000, 100, 1000, prefix=1000)
    for size in (0, 1_000_000, 2_000_000, 3_000_000, 4_000_000):
        rates.loaded(size, 0.2 + size / 1e6)
    assert not rates.load_is_faster(1_000_000, 100, 1000, prefix=1000)
    assert rates.load_is_faster(1_000_000, 1000, 1000, prefix=1000)


def test_a_load_that_was_slow_long_ago_is_hoped_to_be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is believed to be slow is not loaded, and would never be seen to have become quick."""
    rates = TailRates(LoadingRates(0.001))
    for size in (1_000_000, 2_000_000, 3_000_000):
        rates.loaded(size, 9.0)
    assert not rates.load_is_faster(1_000_000, 100, 1000, prefix=0)
    monkeypatch.setattr(tail_rates, "BELIEVED_S", -1.0)
    assert rates.load_is_faster(1_000_000, 100, 1000, prefix=0)


def until(met: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not met():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)
