"""Why a sample is too small, or its calibration too far off: a line for each reason, with the figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xkv_service.calibration.limits import ENOUGH, LEAST_AGAIN, LEAST_HELD, LEAST_PARTS, LOST
from xkv_service.calibration.report.numbers import GAP, counted, short, times
from xkv_service.calibration.report.reading import Validation
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.validation import NOT_FINITE


def sample_warnings(figures: Mapping[str, Any], parts: int, settings: CalibrationSettings) -> list[str]:
    """What is to know before a calibration is used; nothing where the sample is large enough.

    Args:
        figures: the calibration's: `sample`, `stability`, `chosen_again` and `validation`.
        parts: of the sample's new documents that can be drawn again.
    """
    found = [
        _few_held_out(figures["sample"]["held_out"], settings),
        _few_parts(parts, figures["sample"]),
        _energy(figures["stability"]),
        _metric(figures["chosen_again"]["metric"]),
        _divergence(figures),
    ]
    return [text.replace(GAP, " ") for text in found if text]


def _few_held_out(held: int, settings: CalibrationSettings) -> str | None:
    if held >= LEAST_HELD:
        return None
    wanted = LEAST_HELD * settings.held_out_every
    return (
        f"Held out to check on: {counted(held, 'document')}, {LEAST_HELD} is the least that says how much "
        f"figures vary. Give {wanted} documents or more."
    )


def _few_parts(parts: int, sample: Mapping[str, int]) -> str | None:
    """A wide model keeps few parts of any sample."""
    if parts >= LEAST_PARTS:
        return None
    known = sample["known"]
    new = sample["documents"] - known
    least = f"{LEAST_PARTS} is the least"
    if new > parts:
        return (
            f"The sample can be drawn again from {counted(parts, 'part')} only, {least}: a model as wide as "
            f"this one keeps no more of {counted(new, 'document')}, so that its plan looks surer than it is."
        )
    source = f" beside {known} of the earlier calibration, which cannot" if known else ""
    said = f"Documents that the sample can be drawn again from: {new}{source}, {least}"
    sure = "it is not known how sure the plan is" if parts < 2 else "the plan looks surer than it is"
    kind = "new documents" if known else "documents"
    return f"{said}: {sure}. Give more {kind}."


def _energy(stability: Mapping[str, Any] | None) -> str | None:
    kept = (stability or {}).get("kept")
    if kept is None or kept["mean"] >= ENOUGH:
        return None
    mean, low, high, enough = (f"{100 * one:.1f} %" for one in (*kept.values(), ENOUGH))
    return (
        f"The sample is small: bases of documents drawn from it keep {mean} ({low} to {high}) of the energy "
        f"that others have in as many directions of their own, {enough} is enough. Give more documents."
    )


def _metric(again: float | None) -> str | None:
    if again is None or again >= LEAST_AGAIN:
        return None
    return (
        f"The metric would have been chosen again in {100 * again:.0f} % of draws of the documents held out, "
        f"{100 * LEAST_AGAIN:.0f} % is the least: others may do as well. Give more documents."
    )


def _divergence(figures: Mapping[str, Any]) -> str | None:
    """Ratios at which answers are lost, and the highest one below at which they are not."""
    found = Validation.of(figures)
    lost, holds = [], None
    for asked in found.ratios:
        best = found.chosen(asked)
        if best is not None and best[1].kl is not None and best[1].kl > LOST:
            lost.append(f"{times(asked)} ({short(best[1].kl)})")
        elif best is None and any(
            found.trials[one].reason == NOT_FINITE for one in found.trials if one[0] == asked
        ):
            lost.append(f"{times(asked)} (not finite)")
        elif best is not None and not lost:
            holds = asked
    if not lost:
        return None
    less = f"Compress to {times(holds)} at most, or give" if holds is not None else "Compress less, or give"
    return (
        f"Predictions diverge by more than {LOST:g} nats, from where on answers are lost, at "
        f"{', '.join(lost)}. {less} more documents like those to be compressed."
    )
