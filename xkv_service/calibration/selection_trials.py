"""What selecting with fewer indexes, or fewer tokens, does to predictions on documents held out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from transformers import PreTrainedModel

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.probes import ProbedPrefix, exact_cache, predictions
from xkv_service.calibration.recall import Recall, measure_recall
from xkv_service.compression import factorize_prefill
from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.prefix import Prefix
from xkv_service.decoding.xkv_attention import enable_xkv
from xkv_service.errors import RatioUnreachable
from xkv_service.fidelity import compare_distributions
from xkv_service.prefilling.prefill import prefill
from xkv_service.selection.spec import SelectionSpec

_SELECTIVE = 0.5
"""Share of a document that may be attended to at most where a trial of its selection is to say anything."""


@dataclass(frozen=True)
class Moved:
    """Predictions against those over exact caches, the mean and the worst over documents.

    Args:
        kl, kl_worst: nats.
        agreement: share of positions with the same likeliest token, of the worst document.
    """

    kl: float
    kl_worst: float
    agreement: float

    def as_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"kl": self.kl, "kl_worst": self.kl_worst, "agreement_worst": self.agreement}


@dataclass(frozen=True, eq=False)
class TriedDocument:
    """A document compressed once for all trials.

    Args:
        base: logits of its probes over the exact cache. prefix: its factors, every layer with an index.
        recall: of the exact attention, by layer and budget.
    """

    document: ProbedPrefix
    base: torch.Tensor
    prefix: Prefix
    recall: Recall

    def compared(self, reuse: Collection[int], selection: SelectionSpec) -> tuple[float, float]:
        """Agreement and divergence of its predictions when the layers `reuse` have no index."""
        cache = XKVCache(replace(self.prefix, reuse=frozenset(reuse)), selection)
        with enable_xkv(self.prefix.model):
            found = predictions(self.prefix.model, cache, self.document.probes)
        return compare_distributions(self.base, found)


class SelectionTrials:
    """Trials of one way to compress.

    Args:
        held: documents to try on; those too short for the ratio or for a selection are left out.
        ratio: that they are compressed to. selection: how tokens are chosen.
        shares: budgets whose recall is measured, as shares of a document.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        held: Sequence[ProbedPrefix],
        calibration: Calibration,
        ratio: float,
        selection: SelectionSpec,
        shares: Sequence[float],
    ) -> None:
        self.selection, self.shares = selection, tuple(shares)
        self._spec = replace(calibrated_spec(ratio, calibration), reuse=())
        self._model, self._calibration = model, calibration
        self.documents = [tried for one in held if _selects(one, selection) for tried in self._tried(one)]

    def moved(self, reuse: Collection[int] = (), budget: float | None = None) -> Moved:
        """What the predictions are when the layers `reuse` have no index.

        Args:
            budget: share of the document, instead of the selection's own budget.
        """
        selection = self.selection if budget is None else replace(self.selection, budget=budget)
        agreements, divergences = zip(
            *(one.compared(reuse, selection) for one in self.documents), strict=True
        )
        return Moved(fmean(divergences), max(divergences), min(agreements))

    def _tried(self, document: ProbedPrefix) -> Iterator[TriedDocument]:
        exact = prefill(self._model, torch.tensor(document.token_ids))
        try:
            base = predictions(self._model, exact_cache(exact), document.probes)
            factors, _ = factorize_prefill(self._model, exact, self._spec, self._calibration)
            prefix = Prefix.of(self._model, factors)
            choices = {share: replace(self.selection, budget=share) for share in self.shares}
            yield TriedDocument(document, base, prefix, measure_recall(prefix, exact, document, choices))
        except RatioUnreachable:
            return
        finally:
            exact.free()


def _selects(document: ProbedPrefix, selection: SelectionSpec) -> bool:
    tokens = len(document.token_ids)
    attended = selection.tokens(tokens) + selection.sink + selection.recent
    return selection.by_index and attended <= _SELECTIVE * tokens
