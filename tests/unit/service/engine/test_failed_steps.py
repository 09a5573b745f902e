"""A step that fails for one sequence costs the others nothing, whatever of it had run before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from asking import SHORT, Asked, generated
from talking import SELECTION, Talker

from xkv_artifacts.store import ArtifactStore
from xkv_service.engine.engine import Engine
from xkv_service.engine.entrance import DIED
from xkv_service.engine.messages import Failed
from xkv_service.engine.prefix_pool import PrefixPool
from xkv_service.engine.runners import SeparateRunner, Work
from xkv_service.engine.settings import EngineSettings
from xkv_service.sessions.context import Context

SETTINGS = EngineSettings(max_running=4, step_tokens=64, prefill_tokens=64, selection=SELECTION)
PROMPT, BAD = [5 + number % 90 for number in range(40)], [7, 200, 7]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_a_sequence_that_fails_beside_one_that_decodes(
    talkers: Callable[[str], Talker], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one forward, behind windows that cannot go back, and where sequences run one after the other."""
    talker, sent, steps = talkers(family), threading.Event(), []
    expected = generated(talker, PROMPT)
    assert len(expected) > 3
    forward = talker.model.model.embed_tokens.forward

    def fail(ids: torch.Tensor) -> torch.Tensor:
        if (ids == 200).any():
            raise RuntimeError("no memory")
        steps.append(ids.shape)
        if len(steps) > 1:
            assert sent.wait(60.0)
        return forward(ids)

    with Engine(talker.loaded, SETTINGS) as engine:
        Asked(engine, PROMPT[:3]).wait()
        steps.clear()
        monkeypatch.setattr(talker.model.model.embed_tokens, "forward", fail)
        good = Asked(engine, PROMPT)
        while len(steps) < 2:
            assert not good.ended.wait(0.01)
        bad = Asked(engine, BAD)
        sent.set()
        assert isinstance(bad.wait().end, Failed)
        assert good.wait().tokens == expected


def test_an_engine_outlives_a_request_that_fails_alone(
    talker: Talker, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = talker.model.model.embed_tokens.forward

    def fail(ids: torch.Tensor) -> torch.Tensor:
        if (ids == 200).any():
            raise RuntimeError("no memory")
        return forward(ids)

    monkeypatch.setattr(talker.model.model.embed_tokens, "forward", fail)
    fingerprint = talker.loaded.identity.fingerprint
    pool = PrefixPool(talker.model, store, SELECTION, 2**24, fingerprint=fingerprint)
    with Engine(talker.loaded, SETTINGS, pool) as engine:
        assert isinstance(Asked(engine, BAD).wait().end, Failed)
        assert Asked(engine, PROMPT, settings=SHORT).wait().tokens == generated(talker, PROMPT)
        assert engine.alive
    pool.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["step", "begin", "inbox"])
def test_an_engine_whose_device_is_lost_ends(
    talker: Talker, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits is told, before that whoever owns the engine; nobody else comes in."""
    order: list[str] = []
    forward, gone = talker.model.model.embed_tokens.forward, threading.Event()

    def fail(*_: object, **__: object) -> torch.Tensor:
        gone.set()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def slow(ids: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return forward(ids)

    monkeypatch.setattr("xkv_service.engine.engine.is_lost", lambda device: gone.is_set())
    monkeypatch.setattr(talker.model.model.embed_tokens, "forward", slow)
    engine = Engine(talker.loaded, SETTINGS, on_death=lambda: order.append("owner"))
    others = [Asked(engine, PROMPT) for _ in range(6)]  # more than run at once
    while engine.state().running < SETTINGS.max_running:
        time.sleep(0.01)
    if where == "step":
        monkeypatch.setattr(talker.model.model.embed_tokens, "forward", fail)
    elif where == "begin":
        monkeypatch.setattr(Engine, "_begin", fail)
    else:
        monkeypatch.setattr(Engine, "_cancel", fail)
        others[-1].cancel()
    last = Asked(engine, PROMPT)
    ends = [one.wait(20.0).end for one in [*others, last]]
    assert all(end is not None for end in ends) and DIED in ends
    assert all(end == DIED for end in ends if isinstance(end, Failed))
    engine.close()
    assert order == ["owner"] and not engine.alive
    assert Asked(engine, PROMPT).wait(1.0).end == DIED


def test_what_cannot_be_settled_is_lost_and_nothing_else(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hear of their end, also where a device takes every sequence with it."""

    slow = threading.Event()

    class Lost(SeparateRunner):
        def run(self, work: Work) -> torch.Tensor:
            time.sleep(0.2 * slow.is_set())
            return super().run(work)

        def settle(self, context: Context) -> None:
            raise RuntimeError("device lost")

    monkeypatch.setattr("xkv_service.engine.engine.make_runner", lambda model, rebuilt_bytes: Lost())
    expected = generated(talker, PROMPT)
    with Engine(talker.loaded, SETTINGS) as engine:
        for _ in range(2):
            assert Asked(engine, PROMPT).wait().tokens == expected
        assert engine.alive and engine.state().kept_tails == 0
        slow.set()
        asked = [Asked(engine, PROMPT) for _ in range(3)]
        while engine.state().running < 3:
            time.sleep(0.01)
    assert all(one.wait(1.0) for one in asked)
