"""Calibrate: from a sample of documents to shared bases, each choice kept where validation says so.

1. Moments of every document's keys and values (they add up; documents stream by).
2. What error each layer stands (`tolerance`), on a few documents.
3. Groups, metric and bases; each choice is tried on documents that the bases were not made from.
4. Which layers need a selection index, likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.certificates import fidelity_thresholds
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.figures import plans, spectra
from xkv_service.calibration.likeness import layer_likeness
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.observed import Observed, observe_document, reach_of
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.selection_choice import choose_selection
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.steps import STEPS
from xkv_service.calibration.tolerance import SHARES, Tolerances, measure, no_tolerances
from xkv_service.calibration.validation import Candidate, validate
from xkv_service.errors import InvalidSpec, RatioUnreachable
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.prefilling.prefill import prefill
from xkv_service.spec import CompressionSpec

Observe = Callable[[str], None]
_Name = TypeVar("_Name", bound=str)


def split(
    sample: Sequence[ProbedPrefix], settings: CalibrationSettings
) -> tuple[list[ProbedPrefix], list[ProbedPrefix]]:
    """(documents that bases are made from, documents that choices are tried on).

    Raises:
        InvalidSpec: fewer than two documents.
    """
    if len(sample) < 2:
        raise InvalidSpec(
            f"a calibration needs 2 documents at least, this sample has {len(sample)}",
            hint="give more documents: one in four is kept to check the result on",
        )
    step = max(2, round(1 / settings.held_out))
    held = set(range(step - 1, len(sample), step)) or {len(sample) - 1}
    return (
        [one for number, one in enumerate(sample) if number not in held],
        [one for number, one in enumerate(sample) if number in held],
    )


def calibrate(
    model: PreTrainedModel,
    sample: Sequence[ProbedPrefix],
    settings: CalibrationSettings | None = None,
    observer: Observe = lambda message: None,
) -> Calibration:
    """Calibrate one model in this process.

    Args:
        model: a supported model whose layers have full attention (or windows and states beside it).
        sample: documents like those that will be compressed, with probes.
        observer: told what is being done.

    Raises:
        InvalidSpec: too few documents.
        RatioUnreachable: no document held out is long enough for the settings' ratio.
        UnsupportedModel: latent attention, or a model whose cache cannot be compressed.
    """
    settings = settings or CalibrationSettings()
    used, held = split(sample, settings)
    found = Observed.nothing(model, reach_of(inspect_loaded(model).layout, settings))
    for number, document in enumerate(used, 1):
        observer(f"moments {number}/{len(used)}: {document.name}")
        observe_document(model, document, found)
    return decide(model, found, used, held, settings, observer)


@torch.no_grad()
def decide(
    model: PreTrainedModel,
    found: Observed,
    used: Sequence[ProbedPrefix],
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    observer: Observe = lambda message: None,
) -> Calibration:
    """Everything after the moments: tolerances, groups, metric, bases, validation.

    Args:
        found: what was observed of `used`, the documents that bases are made from.
        held: those that choices are tried on.

    Raises:
        RatioUnreachable: no document of `held` is long enough for the settings' ratio.
    """
    tolerances = _tolerances(model, found.moments, used[: settings.tolerance_documents], observer)
    candidates = Candidates(model, found, tolerances, settings)
    best, choices = _choose(model, candidates, held, settings, observer)
    selection = choose_selection(model, held, best, settings, observer)
    best = replace(best, figures={"selection": selection})
    observer(f"validating at {', '.join(f'{one:g}x' for one in settings.ratios)}")
    figures: dict[str, Any] = {
        "settings": asdict(settings),
        "sample": _sample_figures(used, held, found.moments),
        **choices,
        "selection": selection,
        "tolerances": _tolerance_figures(tolerances, found.moments),
        "validation": _validation(model, held, settings, best),
        "likeness": layer_likeness(found.moments),
        "plans": plans(best, settings.ratios, candidates.bits_full),
        "spectra": spectra(found.moments),
    }
    measured = replace(best, figures=figures)
    thresholds = fidelity_thresholds(model, held, settings.ratios, measured)
    return replace(measured, figures={**figures, "thresholds": thresholds})


def _choose(
    model: PreTrainedModel,
    candidates: Candidates,
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    observer: Observe,
) -> tuple[Calibration, dict[str, Any]]:
    """The metric that is best in fixed groups, then the better groups in it; and what was measured."""
    observer(f"trying {len(settings.weightings)} metrics on {len(held)} documents")
    fixed = candidates.fixed_groups()
    tried = {one: candidates.calibration(one, fixed) for one in settings.weightings}
    weighting, metrics = _best(model, held, settings, tried)
    groups = candidates.best_groups(weighting)
    observer(f"trying groups {groups} on {len(held)} documents")
    options = {"fixed": tried[weighting], "chosen": candidates.calibration(weighting, groups)}
    name, partitions = _best(model, held, settings, options)
    return options[name], {
        "weighting": weighting,
        "groups": [list(group.layers) for group in options[name].groups],
        "metrics": metrics,
        "partition": partitions,
    }


def _tolerances(
    model: PreTrainedModel, moments: Moments, documents: Sequence[ProbedPrefix], observer: Observe
) -> Tolerances:
    tolerances = no_tolerances(moments)
    for number, document in enumerate(documents, 1):
        observer(f"tolerances {number}/{len(documents)}: {document.name}")
        exact = prefill(model, torch.tensor(document.token_ids))
        try:
            measure(model, exact, document.probes, moments, tolerances, 1 / len(documents))
        finally:
            exact.free()
    return tolerances


def _best(
    model: PreTrainedModel,
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    tried: dict[_Name, Calibration],
) -> tuple[_Name, dict[str, Any]]:
    """The name of the calibration of least divergence, the first of equals, and what was measured of all."""
    ratio = settings.ratio
    ways = [Candidate(name, calibrated_spec(ratio, one), one) for name, one in tried.items()]
    found = validate(model, held, ways, settings.selection)
    if not any(one.divergence for one in found.values()):
        raise RatioUnreachable(
            f"no document held out can be compressed at {ratio:g}x: {next(iter(found.values())).reason}",
            hint="calibrate on longer documents, or at a lower ratio",
        )
    return min(tried, key=lambda name: found[name].kl), {name: one.as_dict() for name, one in found.items()}


def _validation(
    model: PreTrainedModel, held: Sequence[ProbedPrefix], settings: CalibrationSettings, best: Calibration
) -> list[dict[str, Any]]:
    """At every ratio: the fixed recipe, and what each decision adds to it."""
    rows = []
    for ratio in settings.ratios:
        fixed = CompressionSpec(ratio=ratio, group_size=settings.group_size, index="sketch")
        steps = [
            Candidate("recipe", fixed),
            Candidate("derived index", replace(fixed, index="derived")),
            *(Candidate(name, calibrated_spec(ratio, best, **one), best) for name, one in STEPS.items()),
        ]
        for name, outcome in validate(model, held, steps, settings.selection).items():
            rows.append({"asked": ratio, "step": name, **outcome.as_dict()})
    return rows


def _sample_figures(
    used: Sequence[ProbedPrefix], held: Sequence[ProbedPrefix], moments: Moments
) -> dict[str, int]:
    return {
        "documents": len(used),
        "held_out": len(held),
        "tokens": moments.tokens,
        "probes": sum(len(one.probes) for one in held),
    }


def _tolerance_figures(tolerances: Tolerances, moments: Moments) -> list[dict[str, Any]]:
    return [
        {
            "layer": moments.layers[place].index,
            "kind": kind,
            "noise": list(SHARES),
            "divergence": one.divergence,
            "tolerated": one.error / (moments.variance(kind, place) or 1.0),
        }
        for (place, kind), one in tolerances.items()
    ]
