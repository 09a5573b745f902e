"""What a run tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        documents, settled: met so far, and with a known outcome. reading: more may come.
        ready: some worker has its model.
        tokens, tokens_left: computed by this run, and still to compute.
        tokens_per_second: computed since the first worker was ready, 0 before.
        ratio: bytes of the exact caches for each byte stored, 0 while there are none.
    """

    documents: int
    settled: int
    reading: bool
    ready: bool
    tokens: int
    tokens_left: int
    tokens_per_second: float
    ratio: float

    @property
    def seconds_left(self) -> float | None:
        """Estimated, None while there is nothing to go by."""
        if self.reading or not self.tokens_per_second:
            return None
        return self.tokens_left / self.tokens_per_second


class Observer(Protocol):
    """Called from the thread that runs the pipeline, a few times a second at most."""

    def progress(self, now: Progress) -> None:
        """Something moved."""

    def note(self, text: str) -> None:
        """Something a person should know that is no error: a worker died, Redis is awaited."""


class Silent:
    """Watches nothing."""

    def progress(self, now: Progress) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
