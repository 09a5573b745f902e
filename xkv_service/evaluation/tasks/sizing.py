"""Make a sample as long as asked: as many units of hay as the model's own tokenizer leaves room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.tasks.base import Room, Sample

_TRIAL = 64
_ROUNDS = 6


class Hay:
    """The first n units of an endless (or short) stream, the same ones however often they are asked for."""

    def __init__(self, units: Iterator[str]) -> None:
        self._units, self._drawn = units, list[str]()

    def first(self, count: int) -> list[str]:
        """The first `count` units, fewer when the stream ends."""
        while len(self._drawn) < count:
            unit = next(self._units, None)
            if unit is None:
                break
            self._drawn.append(unit)
        return self._drawn[:count]


def fit(
    task: str, build: Callable[[int], Sample], room: Room, reply_tokens: int, hay: Hay | None = None
) -> Sample:
    """The longest sample whose prompt and reply take at most `room.tokens` tokens, to about a unit.

    RULER sizes its prompts the same way: the length is that of prompt and reply together.

    Args:
        task: named in the error.
        build: makes the sample with n units of hay; the same n gives the same sample.
        reply_tokens: tokens left free for the reply.
        hay: where the units come from, if they may run out.

    Raises:
        InvalidSpec: not even the sample without hay fits, or the hay runs out.
    """
    limit = room.tokens - reply_tokens
    trial = _TRIAL if hay is None else max(1, len(hay.first(_TRIAL)))
    least, some = _cost(build(0), room), _cost(build(trial), room)
    if least > limit:
        raise InvalidSpec(
            f"task {task} needs at least {least + reply_tokens} tokens, {room.tokens} were asked for",
            hint="ask for longer documents or fewer questions on each",
        )
    unit = max(1.0, (some - least) / trial)
    units = int((limit - least) / unit)
    for _ in range(_ROUNDS):
        left = limit - _cost(build(units), room)
        if 0 <= left < 2 * unit:
            break
        units = max(0, units + math.floor(left / unit))
    while units > 0 and (over := _cost(build(units), room) - limit) > 0:
        units = max(0, units - math.ceil(over / unit))
    if hay is not None and len(hay.first(units)) < units:
        raise InvalidSpec(
            f"task {task}: the text at hand ends before {room.tokens} tokens",
            hint="bring more of it, or ask for shorter documents",
        )
    return build(units)


def _cost(sample: Sample, room: Room) -> int:
    longest = max(sample.questions, key=lambda question: len(question.text) + len(question.answer_prefix))
    return room.prompt(sample.document, longest)
