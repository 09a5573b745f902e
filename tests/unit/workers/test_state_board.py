"""What replicas say, and what stays of them when they are gone."""

from __future__ import annotations

import pytest

from xkv_service.engine.messages import EngineState
from xkv_workers.serving import state_board
from xkv_workers.serving.state_board import StateBoard


class Clock:
    """Time that a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(state_board, "time", clock)
    return clock


def state(steps: float, running: int = 0, **more: float) -> EngineState:
    return EngineState(running, 0, 0, 0, 0, (), {"steps": steps, **more})


def counted(board: StateBoard) -> float:
    return sum(said.counters.get("steps", 0) for said in board.all())


def test_a_replica_that_ends_is_gone_at_once_and_what_it_counted_stays(clock: Clock) -> None:
    board = StateBoard()
    board.put("a", state(5))
    board.put("b", state(7, running=1, loads=2))
    assert len(board.all()) == 2 and counted(board) == 12
    board.leave("b", state(8, loads=3))
    board.put("a", state(6))
    (left,) = board.all()
    assert left.running == 0 and left.counters == {"steps": 14, "loads": 3}


def test_one_that_is_silent_is_gone_and_counts_once_when_it_speaks_again(clock: Clock) -> None:
    board = StateBoard()
    board.put("a", state(5))
    board.put("b", state(7))
    clock.now = 11
    board.put("a", state(6))
    assert len(board.all()) == 1 and counted(board) == 13
    board.put("b", state(9))
    assert len(board.all()) == 2 and counted(board) == 15


def test_one_that_died_is_forgotten_but_for_what_it_counted(clock: Clock) -> None:
    board = StateBoard()
    board.put("a", state(5))
    board.put("b", state(7))
    for clock.now in (9, 601, 1200):
        board.put("a", state(5))
        assert counted(board) == 12
    assert len(board.all()) == 1


def test_nobody_there_says_nothing(clock: Clock) -> None:
    board = StateBoard()
    board.put("a", state(5))
    board.leave("a", state(5))
    assert board.all() == []
    board.put("b", state(1))
    assert counted(board) == 6
