"""`SelectionSpec`: which tokens of a compressed prefix each new token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xkv_service.errors import InvalidSpec
from xkv_service.numeric import is_integer

SelectorKind = Literal["auto", "sketch", "landmark", "exact", "dense"]
Granularity = Literal["layer", "head"]


@dataclass(frozen=True)
class SelectionSpec:
    """How selective reconstruction chooses tokens (paper, section 3.3). Defaults: docs/selection.md.

    Every query token chooses for itself, so an answer does not depend on how its prompt was cut into calls.
    Tokens that the artifact keeps exact (its sink, recent and outlier tokens) are attended to always and are
    not part of the budget.

    Args:
        selector: what scores the prefix's tokens: "sketch" or "landmark" the index of that name; "exact" the
            true scores of the rebuilt keys (a reference: it rebuilds every key); "dense" selects nothing and
            attends to every token; "auto" the index that the artifact has, or "dense" without one. Latent
            layers (MLA) always have one: the leading columns of their token factors.
        budget: tokens to rebuild for each query token, an integer from 1, or a share of the prefix, a float
            above 0 and at most 1.
        granularity: one selection for all heads of a "layer", or one for each KV "head".
        sink, recent: first and last tokens of the prefix that are rebuilt always, beside the budget.

    Raises:
        InvalidSpec: a setting out of range; the message names field, value and range.
    """

    selector: SelectorKind = "auto"
    budget: int | float = 1 / 16
    granularity: Granularity = "layer"
    sink: int = 0
    recent: int = 32

    def __post_init__(self) -> None:
        for name, allowed in (
            ("selector", ("auto", "sketch", "landmark", "exact", "dense")),
            ("granularity", ("layer", "head")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidSpec(
                    f"{name}={getattr(self, name)!r} is unknown", hint=f"use one of {', '.join(allowed)}"
                )
        whole = is_integer(self.budget) and self.budget >= 1
        share = isinstance(self.budget, float) and 0.0 < self.budget <= 1.0
        if not (whole or share):
            raise InvalidSpec(
                f"budget={self.budget!r} is out of range",
                hint="use tokens (an integer from 1) or a share of the prefix (a float from 0 to 1)",
            )
        for name in ("sink", "recent"):
            value = getattr(self, name)
            if not is_integer(value) or value < 0:
                raise InvalidSpec(f"{name}={value!r} is out of range", hint="use an integer from 0")

    @property
    def by_index(self) -> bool:
        """Whether an index chooses, where the artifact has one."""
        return self.selector not in ("exact", "dense")

    def tokens(self, prefix_tokens: int) -> int:
        """The budget in tokens for a prefix of `prefix_tokens`."""
        if isinstance(self.budget, float):
            return max(1, round(self.budget * prefix_tokens))
        return min(self.budget, prefix_tokens)
