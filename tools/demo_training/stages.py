"""The stages of training: each teaches what the next one needs, and ends when its accuracy says so."""

from collections.abc import Sequence
from dataclasses import dataclass

from demo_training.batches import Shape


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        name: its name in logs and data seeds.
        lengths: tokens of a row; every batch has rows of one of these lengths.
        weights: how often each length is drawn.
        gate: the share of right answers (right tokens while copying) that ends the stage; None: never.
        ruler_share: share of rows with RULER tasks; None: the copying task.
    """

    name: str
    lengths: tuple[int, ...]
    gate: float | None
    ruler_share: float | None
    weights: tuple[float, ...] = (1.0,)

    def shapes(self, tokens_per_step: int) -> Sequence[Shape]:
        """Return the batch shapes that hold about ``tokens_per_step`` tokens."""
        return [Shape(max(1, tokens_per_step // length), length) for length in self.lengths]


STAGES: tuple[Stage, ...] = (
    Stage("copy", (256,), gate=0.98, ruler_share=None),
    Stage("short", (256,), gate=0.80, ruler_share=0.0),
    Stage("medium", (1024,), gate=0.90, ruler_share=0.15),
    Stage("long", (4608,), gate=0.95, ruler_share=0.25),
    Stage("mixed", (9216, 4608, 1024), gate=None, ruler_share=0.3, weights=(0.5, 0.3, 0.2)),
)
