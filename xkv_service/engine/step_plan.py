"""Which tokens one step of the engine computes."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from xkv_service.engine.sequence import Sequence
from xkv_service.engine.settings import EngineSettings


@dataclass(frozen=True)
class Part:
    """A sequence and the tokens of it that a step computes: the first `count` of what it has to do."""

    sequence: Sequence
    count: int

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return self.sequence.todo[: self.count]


def plan_step(running: Many[Sequence], settings: EngineSettings) -> list[Part]:
    """The next token of every sequence that decodes, and prompts as far as the limit goes.

    Prompts with no more than `step_tokens` left go first, since a question behind a stored prefix is not to
    wait for somebody else's document; half of the step is kept for the prompt that came first. The others
    have what is left, in the order they came. While some decode, prompts get `step_tokens` together, so that
    no stream stalls for longer than these take; and no more get those that go on, where others can end in
    this step.

    Args:
        settings: those of the model's device.
    """
    decoding = [sequence for sequence in running if sequence.decoding]
    parts = [Part(sequence, len(sequence.todo)) for sequence in decoding]
    prompts = [sequence for sequence in running if not sequence.decoding]
    ending = sum(len(one.todo) for one in prompts if len(one.todo) <= settings.step_tokens)
    left = settings.step_tokens if decoding else settings.prefill_tokens
    if ending:
        left = min(left, ending + settings.step_tokens)
    kept = min(len(prompts[0].todo), left // 2) if prompts else 0
    for sequence in sorted(prompts, key=lambda one: len(one.todo) > settings.step_tokens):
        if sequence is prompts[0]:
            kept = 0
        if count := min(left - kept, len(sequence.todo)):
            parts.append(Part(sequence, count))
            left -= count
    return parts
