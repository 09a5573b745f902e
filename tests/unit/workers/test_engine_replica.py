"""What Serve is told of a replica's health. The moments are chosen here."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest

from xkv_workers.serving.engine_replica import EngineReplica


class Engine:
    """Stands in for an engine whose step began a while ago."""

    def __init__(self, stuck_s: float) -> None:
        self.stuck_s = stuck_s


class Ended(Exception):
    """A process ended."""


def check(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(EngineReplica, "_report_from_now_on", lambda _: None)
    replica = EngineReplica.__new__(EngineReplica)
    monkeypatch.setattr(replica, "_engine", engine, raising=False)
    asyncio.run(replica.check_health())


def test_one_whose_engine_is_at_work_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    check(Engine(599.0), monkeypatch)


def test_one_whose_engine_hangs_ends_so_that_serve_does_not_wait_for_its_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Ended):
        check(Engine(601.0), monkeypatch)
