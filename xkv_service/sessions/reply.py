"""`Reply`: an answer, and what it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Finish = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Reply:
    """One answer.

    Args:
        text: what the model said.
        finish: "stop" the model or a stop text ended it; "length" the settings or the context window did;
            "interrupted" somebody did.
        prompt_tokens: tokens of the whole conversation up to the answer.
        cached_tokens: how many of them were there already, prefix and tail.
        dropped_tokens: tokens of the tail that the new prompt did not continue, or that could not be kept
            since a sliding window or a state cannot go back: forgotten, and computed again where the prompt
            has them.
        generated_tokens: tokens of the answer.
        rebuilt_tokens: prefix tokens rebuilt for each new token, averaged over layers and steps; 0 with an
            exact cache.
        seconds: from the question to the end of the answer. first_token_seconds: to its first token.
    """

    text: str
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    dropped_tokens: int
    generated_tokens: int
    rebuilt_tokens: float
    seconds: float
    first_token_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded a second, behind the first."""
        left = self.seconds - self.first_token_seconds
        return (self.generated_tokens - 1) / left if self.generated_tokens > 1 and left > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
