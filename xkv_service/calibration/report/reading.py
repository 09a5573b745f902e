"""Reads figures, which come from a file: what is not there, or not as it should be, is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xkv_service.calibration.steps import STEPS, best_step, margin

Figures = Mapping[str, Any]

_LARGEST = 1e15
_ROUNDING, _ALL = 1e-6, 1e-9


def number(value: object) -> float | None:
    """A finite number of a size that can be shown."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _LARGEST and math.isfinite(value) else None


def share(value: object) -> float | None:
    """A number from 0 to 1, where rounding may have led just beyond."""
    found = number(value)
    if found is None or not -_ROUNDING <= found <= 1 + _ROUNDING:
        return None
    return 1.0 if found > 1 - _ALL else max(found, 0.0)


def amount(value: object) -> float | None:
    """A number from 0."""
    found = number(value)
    return found if found is not None and found >= 0 else None


def mapping(value: object) -> Figures:
    """Itself, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: object) -> list[Any]:
    """A list's items."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else []


def layers(value: object) -> tuple[int, ...]:
    """Layer numbers; nothing where one of them is none."""
    found = items(value)
    whole = all(isinstance(one, int) and number(one) is not None and one >= 0 for one in found)
    return tuple(found) if whole else ()


def matrix(value: object) -> list[list[float | None]]:
    """A square matrix of shares, None where one is unknown; empty where it is not square."""
    rows = [[share(one) for one in items(row)] for row in items(value)]
    return rows if all(len(row) == len(rows) for row in rows) else []


@dataclass(frozen=True)
class Trial:
    """What was measured of one way to compress.

    Args:
        kl: mean divergence of the predictions, nats. kl_error: its standard error. kl_worst: of a document.
        agreement, agreement_worst: share of positions with the same likeliest token.
        ratio: bytes of the exact cache / bytes stored.
        key_error, value_error: relative reconstruction errors.
        documents: how many. reason: why there is nothing.
        answers, answers_exact: share of the questions whose answer is predicted, here and by the exact cache.
        questions: how many have a known answer.
    """

    kl: float | None
    kl_error: float | None
    kl_worst: float | None
    agreement: float | None
    agreement_worst: float | None
    ratio: float | None
    key_error: float | None
    value_error: float | None
    documents: float | None
    reason: str | None
    answers: float | None
    answers_exact: float | None
    questions: float | None

    @classmethod
    def of(cls, row: Figures) -> Trial:
        """From one row of the figures."""
        reason = row.get("reason")
        return cls(
            kl=amount(row.get("kl")),
            kl_error=amount(row.get("kl_error")),
            kl_worst=amount(row.get("kl_worst")),
            agreement=share(row.get("agreement")),
            agreement_worst=share(row.get("agreement_worst")),
            ratio=amount(row.get("ratio")),
            key_error=amount(row.get("key_error")),
            value_error=amount(row.get("value_error")),
            documents=amount(row.get("documents")),
            reason=None if reason is None else str(reason),
            answers=share(row.get("answers")),
            answers_exact=share(row.get("answers_exact")),
            questions=amount(row.get("questions")),
        )


def apart(one: Trial, other: Trial) -> bool | None:
    """Whether two divergences differ by more than `steps.margin`; None where an error is unknown."""
    if one.kl is None or other.kl is None or one.kl_error is None or other.kl_error is None:
        return None
    return abs(one.kl - other.kl) > margin(one.kl_error, other.kl_error)


@dataclass(frozen=True)
class Validation:
    """The trials by (ratio asked for, step)."""

    trials: Mapping[tuple[float, str], Trial]

    @classmethod
    def of(cls, figures: Figures) -> Validation:
        """From the figures of a calibration."""
        found = {}
        for row in map(mapping, items(figures.get("validation"))):
            asked = number(row.get("asked"))
            if asked is not None and asked >= 1:
                found[asked, str(row.get("step"))] = Trial.of(row)
        return cls(found)

    @property
    def ratios(self) -> list[float]:
        """Ratios asked for, lowest first."""
        return sorted({asked for asked, _ in self.trials})

    @property
    def steps(self) -> list[str]:
        """In the order in which they were tried."""
        return list(dict.fromkeys(step for _, step in self.trials))

    def at(self, asked: float, step: str) -> Trial | None:
        """The trial, if it was made."""
        return self.trials.get((asked, step))

    def chosen(self, asked: float) -> tuple[str, Trial] | None:
        """What a calibration serves a ratio with, as `choice.best_spec` finds it."""
        tried = {step: trial for step in STEPS if (trial := self.at(asked, step)) and trial.kl is not None}
        if not tried:
            return None
        most = max(trial.documents or 0 for trial in tried.values())
        made = {step: trial for step, trial in tried.items() if (trial.documents or 0) == most}
        errors = {step: trial.kl_error or 0.0 for step, trial in made.items()}
        best = best_step({step: trial.kl or 0.0 for step, trial in made.items()}, errors)
        return best, made[best]


def decided_ratio(figures: Figures) -> float | None:
    """The ratio tried that is nearest to the one that choices were made at."""
    ratios = Validation.of(figures).ratios
    wanted = number(mapping(figures.get("settings")).get("ratio"))
    if not ratios:
        return None
    return ratios[-1] if wanted is None else min(ratios, key=lambda one: abs(one - wanted))


def groups(figures: Figures) -> list[tuple[int, ...]]:
    """The layers of each group, in the order of the layers; empty groups left out."""
    return sorted(filter(None, map(layers, items(figures.get("groups")))))
