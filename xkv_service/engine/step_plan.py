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

    Prompts are taken in the order they came; while others decode they get `step_tokens` together, so that no
    stream stalls for longer than that takes.
    """
    decoding = [sequence for sequence in running if sequence.decoding]
    parts = [Part(sequence, len(sequence.todo)) for sequence in decoding]
    left = settings.step_tokens if decoding else settings.prefill_tokens
    for sequence in running:
        if not sequence.decoding and left > 0:
            count = min(left, len(sequence.todo))
            parts.append(Part(sequence, count))
            left -= count
    return parts
