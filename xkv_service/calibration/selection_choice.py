"""Which layers have a selection index of their own, and what budgets of tokens keep of the attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from xkv_service.calibration import tolerance
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.selection_trials import Moved, SelectionTrials
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.selection.reuse import followers

LIMIT = 1e-3
"""Nats that predictions may move by when layers reuse choices: answers are lost at 0.02."""
HOLDS = tolerance.LIMIT
"""Nats within which predictions hold."""
SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
"""Budgets tried, as shares of a document."""
RECALLS = (0.95, 0.99)
"""Recalls whose budgets are told."""


@torch.no_grad()
def choose_selection(
    model: PreTrainedModel,
    held: Sequence[ProbedPrefix],
    calibration: Calibration,
    settings: CalibrationSettings,
    observer: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """What a calibration says about selection, as plain JSON values (docs/calibration.md).

    Layers lose their index one after the other, the least harmful first, as long as predictions of the
    documents held out do not move by more than `LIMIT`, all of them together. This is tried at the highest
    ratio where predictions hold: where they do not, nothing can be told.
    """
    possible = sorted(followers(inspect_loaded(model).layout.compressible))
    for ratio in sorted({settings.ratio, *settings.ratios}, reverse=True):
        trials = SelectionTrials(model, held, calibration, ratio, settings.selection, SHARES)
        if trials.documents and (own := trials.moved()).kl <= HOLDS:
            break
    else:
        return {
            "reuse": [],
            "reason": "no document held out is long enough to select from, or none survives it",
        }
    observer(f"trying {len(possible)} layers without an index on {len(trials.documents)} documents")
    alone = {layer: trials.moved([layer]) for layer in possible}
    reuse, reused = _together(trials, alone, own)
    return {
        "ratio": ratio,
        "limit": LIMIT,
        "documents": len(trials.documents),
        "reuse": reuse,
        "own": own.as_dict(),
        "reused": reused.as_dict(),
        "alone": [{"layer": layer, **moved.as_dict()} for layer, moved in alone.items()],
        "budgets": [{"share": share, **trials.moved(reuse, share).as_dict()} for share in SHARES],
        "recall": _recall(trials),
    }


def _together(trials: SelectionTrials, alone: dict[int, Moved], own: Moved) -> tuple[list[int], Moved]:
    """The layers that reuse a choice, and what they do together."""
    reuse: list[int] = []
    moved = own
    for layer in sorted(alone, key=lambda one: alone[one].kl):
        if alone[layer].kl > own.kl + LIMIT:
            break
        found = trials.moved([*reuse, layer])
        if found.kl <= own.kl + LIMIT:
            reuse, moved = sorted([*reuse, layer]), found
    return reuse, moved


def _recall(trials: SelectionTrials) -> list[dict[str, Any]]:
    """By layer: the median recall at each of `SHARES`, and the least of them that keeps each of `RECALLS`."""
    rows = []
    for layer in trials.documents[0].recall:
        medians = [
            float(torch.cat([one.recall[layer][share] for one in trials.documents]).median())
            for share in SHARES
        ]
        enough = {
            f"{wanted:g}": next(
                (share for share, found in zip(SHARES, medians, strict=True) if found >= wanted), None
            )
            for wanted in RECALLS
        }
        rows.append({"layer": layer, "median": medians, "enough": enough})
    return rows
