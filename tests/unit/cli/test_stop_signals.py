"""A signal breaks off the start of a server, whatever becomes of the exception on its way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from click.testing import CliRunner

from xkv_cli import serve as module
from xkv_cli.stop_signals import StartBrokenOff, StopSignals

pytestmark = pytest.mark.usefixtures("own_signals")


def _raised(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGTERM)


def _made_another_error(signals: StopSignals) -> None:
    """As compiled code does that goes on with an exception set."""
    try:
        signal.raise_signal(signal.SIGINT)
    except StartBrokenOff as error:
        raise SystemError("returned a result with an exception set") from error


def _dropped(signals: StopSignals) -> None:
    """As Python does in finalizers."""
    with suppress(StartBrokenOff):
        signal.raise_signal(signal.SIGTERM)
    signals.started()


@pytest.mark.parametrize("way", [_raised, _made_another_error, _dropped])
def test_it_says_that_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, way: Callable[[StopSignals], None]
) -> None:
    went_on = []

    def start(signals: StopSignals, options: dict[str, Any]) -> int:
        way(signals)
        went_on.append(way)
        return 0

    monkeypatch.setattr(module, "_serve", start)
    result = CliRunner().invoke(module.serve, [])
    assert not went_on and (result.output, result.exit_code) == ("stopped before it had started\n", 0)


def test_another_error_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(signals: StopSignals, options: dict[str, Any]) -> int:
        raise SystemError("of its own")

    monkeypatch.setattr(module, "_serve", start)
    assert isinstance(CliRunner().invoke(module.serve, []).exception, SystemError)


def test_a_started_server_is_not_broken_off() -> None:
    signals = StopSignals()
    signals.started()
    signal.raise_signal(signal.SIGTERM)
    assert (signals.stop.is_set(), signals.hurry.is_set()) == (True, False)
    signal.raise_signal(signal.SIGINT)
    assert signals.hurry.is_set()
