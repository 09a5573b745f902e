"""Calibrate: from a sample of documents to shared bases, each choice kept where validation says so.

1. Moments of every document's keys and values (they add up; documents stream by).
2. What error each layer stands (`tolerance`), on a few documents.
3. Groups, metric and bases; each choice is tried on documents that the bases were not made from.
4. Which layers need a selection index, likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from xkv_service.calibration.bootstrap import Groups, bootstrap, chosen_again
from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.candidates import Candidates
from xkv_service.calibration.certificates import fidelity_thresholds
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.figures import plans, spectra
from xkv_service.calibration.folds import Folds, fold_count
from xkv_service.calibration.likeness import layer_likeness
from xkv_service.calibration.moments import Moments
from xkv_service.calibration.observed import Observed, calibrated_layers, observe_document, reach_of
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.sample_warnings import sample_warnings
from xkv_service.calibration.selection_choice import choose_selection
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.statistics import document_digest
from xkv_service.calibration.steps import STEPS
from xkv_service.calibration.tolerance import SHARES, Tolerances, measure, no_tolerances
from xkv_service.calibration.validation import Candidate, Outcome, validate
from xkv_service.errors import InvalidSpec, RatioUnreachable
from xkv_service.factorization.ranks import most_ratio
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.layout import ModelLayout
from xkv_service.prefilling.prefill import prefill
from xkv_service.spec import CompressionSpec

Observe = Callable[[str], None]
_Name = TypeVar("_Name", bound=str)


def split(
    sample: Sequence[ProbedPrefix], settings: CalibrationSettings, known: Container[str] = ()
) -> tuple[list[ProbedPrefix], list[ProbedPrefix]]:
    """(documents that bases are made from, documents that choices are tried on).

    Args:
        known: `document_digest` of those that bases are made from in any case.

    Raises:
        InvalidSpec: fewer than two documents, or none that is not known.
    """
    if len(sample) < 2:
        raise InvalidSpec(
            f"a calibration needs 2 documents at least, this sample has {len(sample)}",
            hint="give more documents: one in four is kept to check the result on",
        )
    fresh = [number for number, one in enumerate(sample) if document_digest(one) not in known]
    if not fresh:
        raise InvalidSpec(
            "every document of the sample is in the earlier calibration",
            hint="give others: one in four is kept to check the result on",
        )
    step = settings.held_out_every
    wanted = max(1, len(sample) // step)
    every = max(1, min(step, len(fresh) // wanted))
    held = set(fresh[every - 1 :: every][:wanted])
    return (
        [one for number, one in enumerate(sample) if number not in held],
        [one for number, one in enumerate(sample) if number in held],
    )


def refuse_unreachable(
    layout: ModelLayout, held: Sequence[ProbedPrefix], settings: CalibrationSettings
) -> None:
    """See, before anything is run, that the settings' ratio can be reached by one document held out.

    Raises:
        RatioUnreachable: all are too short for it.
    """
    longest = max(len(one.token_ids) for one in held)
    most = most_ratio(layout, longest, settings.group_size)
    if settings.ratio > most:
        raise RatioUnreachable(
            f"no document held out can be compressed at {settings.ratio:g}x: the longest, of {longest:,} "
            f"tokens, reaches {most:.0f}x at most",
            hint="calibrate on longer documents, or at a lower ratio",
        )


def calibrate(
    model: PreTrainedModel,
    sample: Sequence[ProbedPrefix],
    settings: CalibrationSettings | None = None,
    observer: Observe = lambda message: None,
) -> Calibration:
    """Calibrate one model in this process.

    Args:
        model: a supported model of full or of latent attention (or windows and states beside it).
        sample: documents like those that will be compressed, with probes.
        observer: told what is being done.

    Raises:
        InvalidSpec: too few documents.
        RatioUnreachable: no document held out is long enough for the settings' ratio.
        UnsupportedModel: full and latent attention in one model, or one whose cache cannot be compressed.
    """
    layout = inspect_loaded(model).layout
    settings = settings or CalibrationSettings.of(calibrated_layers(layout))
    used, held = split(sample, settings)
    refuse_unreachable(layout, held, settings)
    reach, count = reach_of(layout, settings), min(len(used), fold_count(layout, settings))
    parts = [Observed.nothing(model, reach) for _ in range(count)]
    for number, document in enumerate(used):
        observer(f"moments {number + 1}/{len(used)}: {document.name}")
        observe_document(model, document, parts[number % count])
    return decide(model, Folds(parts, len(used)), used, held, settings, observer)


@torch.no_grad()
def decide(
    model: PreTrainedModel,
    folds: Folds,
    used: Sequence[ProbedPrefix],
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    observer: Observe = lambda message: None,
) -> Calibration:
    """Everything after the moments: tolerances, groups, metric, bases, validation.

    Args:
        folds: what was observed of the documents that bases are made from.
        used: documents that are among those, one at least: tolerances are measured on the first ones.
        held: those that choices are tried on.

    Raises:
        RatioUnreachable: no document of `held` is long enough for the settings' ratio.
    """
    found = folds.total()
    tolerances = measured_tolerances(model, found.moments, used[: settings.tolerance_documents], observer)

    def candidates_of(sums: Observed) -> Candidates:
        return Candidates(model, sums, tolerances, settings)

    candidates = candidates_of(found)
    best, groups, choices = _choose(model, candidates, held, settings, observer)
    observer("drawing the sample again")
    stability = bootstrap(folds, candidates_of, choices["weighting"], groups)
    selection = choose_selection(model, held, best, settings, observer)
    best = replace(best, figures={"selection": selection})
    observer(f"validating at {', '.join(f'{one:g}x' for one in settings.ratios)}")
    figures: dict[str, Any] = {
        "settings": asdict(settings),
        "sample": _sample_figures(folds, used, held, found.moments),
        **choices,
        "stability": stability,
        "selection": selection,
        "tolerances": _tolerance_figures(tolerances, found.moments),
        "validation": _validation(model, held, settings, best),
        "likeness": layer_likeness(found.moments),
        "plans": plans(best, settings.ratios, candidates.layers),
        "spectra": spectra(found.moments),
    }
    figures["warnings"] = sample_warnings(figures, len(folds.parts), settings)
    measured = replace(best, figures=figures)
    thresholds = fidelity_thresholds(model, held, settings.ratios, measured)
    return replace(measured, figures={**figures, "thresholds": thresholds})


def _choose(
    model: PreTrainedModel,
    candidates: Candidates,
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    observer: Observe,
) -> tuple[Calibration, Groups, dict[str, Any]]:
    """The metric that is best in fixed groups, then the better groups in it; and what was measured."""
    observer(f"trying {len(settings.weightings)} metrics on {len(held)} documents")
    fixed = candidates.fixed_groups()
    tried = {one: candidates.calibration(one, fixed) for one in settings.weightings}
    metrics = _tried(model, held, settings, tried)
    weighting = _best(metrics)
    searched = candidates.best_groups(weighting)
    observer(f"trying groups {searched} on {len(held)} documents")
    options = {"fixed": tried[weighting], "chosen": candidates.calibration(weighting, searched)}
    partitions = _tried(model, held, settings, options)
    name = _best(partitions)
    return (
        options[name],
        fixed if name == "fixed" else searched,
        {
            "weighting": weighting,
            "groups": [list(group.layers) for group in options[name].groups],
            "metrics": {one: outcome.as_dict() for one, outcome in metrics.items()},
            "partition": {one: outcome.as_dict() for one, outcome in partitions.items()},
            "chosen_again": {"metric": _again(metrics), "groups": _again(partitions)},
        },
    )


def measured_tolerances(
    model: PreTrainedModel,
    moments: Moments,
    documents: Sequence[ProbedPrefix],
    observer: Observe = lambda message: None,
) -> Tolerances:
    """What error each layer stands, the mean over documents, one at least."""
    tolerances = no_tolerances(moments)
    for number, document in enumerate(documents, 1):
        observer(f"tolerances {number}/{len(documents)}: {document.name}")
        exact = prefill(model, torch.tensor(document.token_ids))
        try:
            measure(model, exact, document.probes, moments, tolerances, 1 / len(documents))
        finally:
            exact.free()
    return tolerances


def _tried(
    model: PreTrainedModel,
    held: Sequence[ProbedPrefix],
    settings: CalibrationSettings,
    tried: Mapping[_Name, Calibration],
) -> dict[_Name, Outcome]:
    """What was measured of each calibration at the settings' ratio."""
    ratio = settings.ratio
    ways = [Candidate(name, calibrated_spec(ratio, one), one) for name, one in tried.items()]
    found = validate(model, held, ways, settings.selection)
    if not any(one.divergence for one in found.values()):
        raise RatioUnreachable(
            f"no document held out can be compressed at {ratio:g}x: {next(iter(found.values())).reason}",
            hint="calibrate on longer documents, or at a lower ratio",
        )
    return {name: found[name] for name in tried}


def _best(found: Mapping[_Name, Outcome]) -> _Name:
    """The name of least divergence, the first of equals."""
    return min(found, key=lambda name: found[name].kl)


def _again(found: Mapping[_Name, Outcome]) -> float | None:
    return chosen_again({name: one.divergence for name, one in found.items()}, _best(found))


def _validation(
    model: PreTrainedModel, held: Sequence[ProbedPrefix], settings: CalibrationSettings, best: Calibration
) -> list[dict[str, Any]]:
    """At every ratio: the fixed recipe, and what each decision adds to it."""
    rows = []
    for ratio in settings.ratios:
        plain = CompressionSpec(ratio=ratio, group_size=settings.group_size, index="sketch")
        fixed = plain.over("document")
        steps = [
            Candidate("recipe", fixed),
            Candidate("derived index", replace(fixed, index="derived")),
            *(Candidate(name, calibrated_spec(ratio, best, **one), best) for name, one in STEPS.items()),
        ]
        for name, outcome in validate(model, held, steps, settings.selection).items():
            rows.append({"asked": ratio, "step": name, **outcome.as_dict()})
    return rows


def _sample_figures(
    folds: Folds, used: Sequence[ProbedPrefix], held: Sequence[ProbedPrefix], moments: Moments
) -> dict[str, int]:
    return {
        "documents": folds.documents + folds.known,
        "known": folds.known,
        "held_out": len(held),
        "tokens": moments.tokens,
        "observed_probes": sum(len(one.probes) for one in used),
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
