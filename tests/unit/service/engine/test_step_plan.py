"""A step has the next token of every stream, and of prompts no more than they may be stalled for."""

from __future__ import annotations

import threading

import pytest
import torch
from asking import Asked, generated, prompt_of
from talking import Talker

from xkv_service.engine.engine import Engine
from xkv_service.engine.messages import GenerationRequest
from xkv_service.engine.sequence import Sequence
from xkv_service.engine.settings import EngineSettings
from xkv_service.engine.step_plan import plan_step
from xkv_service.sessions.settings import GenerationSettings
from xkv_service.sessions.text_stream import TextStream

SETTINGS = EngineSettings(step_tokens=16, prefill_tokens=64)
MARK, ANSWER = 200, GenerationSettings(max_new_tokens=20)


def _sequence(prompt: int, *, decoding: bool = False) -> Sequence:
    request = GenerationRequest("one", (MARK,) * prompt, ANSWER)
    made = Sequence(request, lambda event: None, TextStream(lambda ids: ""), most=20, ends=frozenset())
    made.todo = list(request.token_ids)
    if decoding:
        made.accept(torch.zeros(1), 0)
    return made


@pytest.mark.parametrize(
    ("streams", "prompts", "counts"),
    [
        (0, [40, 50, 9], {0: 16, 2: 9}),
        (0, [40, 50, 17], {0: 40, 1: 24}),
        (0, [200, 10, 3], {0: 16, 1: 10, 2: 3}),
        (0, [16, 16, 16, 16, 16], {0: 16, 1: 16, 2: 16, 3: 16}),
        (0, [200], {0: 64}),
        (0, [40, 20, 17], {0: 40, 1: 20, 2: 4}),
        (0, [200, 300], {0: 64}),
        (0, [300, 200, 1], {0: 16, 2: 1}),
        (2, [], {}),
        (2, [10, 50, 9], {0: 10, 2: 6}),
        (2, [50, 10, 3], {0: 8, 1: 8}),
        (1, [50, 3], {0: 13, 1: 3}),
        (1, [200], {0: 16}),
    ],
)
def test_prompts_that_can_end_go_first_and_the_oldest_has_half(
    streams: int, prompts: list[int], counts: dict[int, int]
) -> None:
    reading = [_sequence(count) for count in prompts]
    writing = [_sequence(5, decoding=True) for _ in range(streams)]
    parts = plan_step([*reading, *writing], SETTINGS)
    assert [(part.sequence, part.count) for part in parts[:streams]] == [(one, 1) for one in writing]
    found = {reading.index(part.sequence): part.count for part in parts[streams:]}
    assert found == counts


def test_a_long_prompt_holds_a_stream_up_for_a_chunk_at_most(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step that computes some of it has the stream's next token as well."""
    sent, steps = threading.Event(), []
    forward = talker.model.model.embed_tokens.forward

    def look(ids: torch.Tensor) -> torch.Tensor:
        marked = int((ids == MARK).sum())
        steps.append((marked, ids.numel() - marked))
        if steps[-1] == (0, 1):
            assert sent.wait(60.0)
        return forward(ids)

    prompt, long = prompt_of(talker, "Where?", document=False), [MARK] * (10 * SETTINGS.step_tokens)
    expected = generated(talker, prompt, most=20), generated(talker, long)
    with Engine(talker.loaded, SETTINGS) as engine:
        Asked(engine, [5]).wait()
        monkeypatch.setattr(talker.model.model.embed_tokens, "forward", look)
        stream = Asked(engine, prompt, settings=ANSWER)
        while (0, 1) not in steps:
            assert not stream.ended.wait(0.01)
        joined = Asked(engine, long)
        sent.set()
        assert (stream.wait().tokens, joined.wait().tokens) == expected
    assert [step for step in steps if step[0]] == [(SETTINGS.step_tokens, 1)] * 10
