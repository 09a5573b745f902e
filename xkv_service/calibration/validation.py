"""What a way to compress does to the model's predictions, on documents it was not made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.probes import Probe, ProbedPrefix, exact_cache, predictions, right_answers
from xkv_service.compression import factorize_prefill, rotary_tables
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.errors import RatioUnreachable
from xkv_service.factorization.ranks import size_of
from xkv_service.factors import PrefixFactors
from xkv_service.fidelity import compare_distributions
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill
from xkv_service.selection.spec import SelectionSpec
from xkv_service.spec import CompressionSpec

NOT_FINITE = "no finite divergence"
"""Reason of an outcome whose predictions are none."""


@dataclass(frozen=True)
class Candidate:
    """One way to compress."""

    name: str
    spec: CompressionSpec
    calibration: Calibration | None = None


@dataclass
class Outcome:
    """What was measured of a candidate, one entry a document.

    Args:
        divergence: nats, decoding from the factors with selection as a session does. agreement: share of
            positions with the same likeliest token. ratio: bytes of the exact cache / bytes stored.
        key_error, value_error: relative reconstruction errors, the mean over groups.
        right, exact_right: whether each known answer is predicted, here and by the exact cache.
        reason: why there is nothing of a document.
    """

    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    key_error: list[float] = field(default_factory=list)
    value_error: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    exact_right: list[bool] = field(default_factory=list)
    reason: str | None = None

    def note(self, exact: torch.Tensor, other: torch.Tensor, probes: Sequence[Probe]) -> None:
        """The predictions of one more document: logits [positions, vocabulary] of its probes."""
        agreement, divergence = compare_distributions(exact, other)
        self.agreement.append(agreement)
        self.divergence.append(divergence)
        self.right += right_answers(other, probes)
        self.exact_right += right_answers(exact, probes)

    @property
    def kl(self) -> float:
        """Mean divergence; infinite where nothing could be measured."""
        return fmean(self.divergence) if self.divergence else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: the reason where nothing, or no number, was measured."""
        if not math.isfinite(self.kl):
            return {"reason": self.reason or NOT_FINITE}
        count = len(self.divergence)
        return {
            "kl": self.kl,
            "kl_error": stdev(self.divergence) / count**0.5 if count > 1 else None,
            "kl_worst": max(self.divergence),
            "agreement": fmean(self.agreement),
            "agreement_worst": min(self.agreement),
            "ratio": fmean(self.ratio),
            "key_error": fmean(self.key_error),
            "value_error": fmean(self.value_error),
            "documents": count,
            **self._answers(),
        }

    def _answers(self) -> dict[str, float]:
        """Shares of the questions that are answered right; nothing where no answer is known."""
        if not self.right:
            return {}
        return {
            "answers": fmean(self.right),
            "answers_exact": fmean(self.exact_right),
            "questions": len(self.right),
        }


def validate(
    model: PreTrainedModel,
    sample: Iterable[ProbedPrefix],
    candidates: Sequence[Candidate],
    selection: SelectionSpec | None = None,
) -> Mapping[str, Outcome]:
    """Every candidate on every document, paired; by the candidates' names.

    Args:
        selection: how tokens are chosen while decoding; by default as a session chooses them.
    """
    found = {candidate.name: Outcome() for candidate in candidates}
    for document in sample:
        exact = prefill(model, torch.tensor(document.token_ids))
        try:
            base = predictions(model, exact_cache(exact), document.probes)
            for candidate in candidates:
                factors = _factors(model, exact, candidate, found[candidate.name])
                if factors is not None:
                    other = _predictions(model, factors, document, selection)
                    found[candidate.name].note(base, other, document.probes)
        finally:
            exact.free()
    return found


@torch.no_grad()
def _factors(
    model: PreTrainedModel, exact: Prefill, candidate: Candidate, outcome: Outcome
) -> PrefixFactors | None:
    """The candidate's factors, with their bytes and errors noted; None where the ratio cannot be reached."""
    try:
        factors, errors = factorize_prefill(model, exact, candidate.spec, candidate.calibration)
    except RatioUnreachable as error:
        outcome.reason = error.message
        return None
    use = rotary_tables(exact)[1]
    size = size_of(exact.layout, exact.tokens, candidate.spec, use, candidate.calibration)
    outcome.ratio.append(size.ratio)
    outcome.key_error.append(fmean(errors.key_error))
    outcome.value_error.append(fmean(errors.value_error))
    return factors


def _predictions(
    model: PreTrainedModel, factors: PrefixFactors, document: ProbedPrefix, selection: SelectionSpec | None
) -> torch.Tensor:
    with enable_xkv(model):
        return predictions(model, XKVCache.from_factors(model, factors, selection), document.probes)
