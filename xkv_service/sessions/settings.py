"""`GenerationSettings`: how an answer is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer, is_number


@dataclass(frozen=True)
class GenerationSettings:
    """How to decode one answer; by default greedily.

    Args:
        max_new_tokens: the longest answer; the model's context window may end it sooner.
        temperature: what logits are divided by before sampling; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability.
        stop: texts that end the answer; they are not part of it.
        seed: of the sampling, the same answer for the same seed; None: a new one each time.

    Raises:
        InvalidSpec: a setting out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise InvalidSpec(
                f"max_new_tokens={self.max_new_tokens!r} is out of range", hint="use an integer from 1"
            )
        if not is_number(self.temperature) or not 0.0 <= self.temperature <= 100.0:
            raise InvalidSpec(
                f"temperature={self.temperature!r} is out of range", hint="use 0 (greedy) to 100"
            )
        if not is_number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise InvalidSpec(f"top_p={self.top_p!r} is out of range", hint="use a number above 0, at most 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidSpec(f"stop={self.stop!r} is no tuple of texts", hint='use stop=("text",)')
        if self.seed is not None and not (is_integer(self.seed) and 0 <= self.seed < 2**63):
            raise InvalidSpec(f"seed={self.seed!r} is out of range", hint="use an integer from 0")
