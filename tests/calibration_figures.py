"""Figures of a calibration that never was: every part that a report can show."""

from __future__ import annotations

from typing import Any

STEPS = (
    "recipe", "derived index", "ranks and weights", "bits", "calibrated bases", "calibrated bases, 4 bits",
    "calibrated bases, bits",
)  # fmt: skip
RATIOS = (8.0, 20.0, 48.0)


def calibration_figures(layers: int = 10) -> dict[str, Any]:
    """Of a model with so many layers, in groups of up to four."""
    groups = [list(range(first, min(first + 4, layers))) for first in range(0, layers, 4)]
    return {
        "model": "demo-llama",
        "settings": {"ratio": 20.0, "ratios": list(RATIOS)},
        "sample": {"documents": 12, "held_out": 4, "tokens": 48123, "observed_probes": 72, "probes": 24},
        "weighting": "tolerance+both",
        "groups": groups,
        "metrics": {"plain": trial(0.0043), "tolerance+both": trial(0.0021)},
        "partition": {"fixed": trial(0.0021), "chosen": trial(0.0018)},
        "tolerances": [_tolerance(layer, kind) for layer in range(layers) for kind in ("key", "value")],
        "validation": [_row(asked, number) for asked in RATIOS for number in range(len(STEPS))],
        "likeness": {"key": _likeness(layers), "value": _likeness(layers)},
        "plans": {str(asked): [_plan(asked, group) for group in groups] for asked in RATIOS},
        "spectra": {side: {"1": _spectrum(3), "4": _spectrum(6)} for side in ("key", "value")},
        "chosen_again": {"metric": 0.71, "groups": 0.993},
        "stability": _stability(groups),
        "selection": _selection(sum(groups, [])),
        "thresholds": [{"ratio": 20.0, "worst": 0.0134, "kl": 0.0402}],
        "warnings": ["Few documents: standard errors are wide."],
    }


def trial(kl: float) -> dict[str, Any]:
    """What was measured of one candidate."""
    return {
        "kl": kl, "kl_error": kl / 5, "kl_worst": 2 * kl, "agreement": 1 - kl, "agreement_worst": 1 - 2 * kl,
        "ratio": 20.04, "key_error": 0.072, "value_error": 0.183, "documents": 4,
        "answers": 1 - 20 * min(kl, 0.05), "answers_exact": 0.958, "questions": 24,
    }  # fmt: skip


def _row(asked: float, number: int) -> dict[str, Any]:
    row = {"asked": asked, "step": STEPS[number]}
    if number == 0 and asked == RATIOS[-1]:
        return {**row, "reason": "ratio=48 cannot be reached"}
    return {**row, **trial(1e-6 * asked**3 / 4**number), "ratio": asked + 0.01 * number}


def _stability(groups: list[list[int]]) -> dict[str, Any]:
    moved = [
        {"layers": group, "kind": kind, "bits": 400 + group[0], "low": 350, "high": 471}
        for group in groups
        for kind in ("key", "value")
    ]
    return {
        "documents": 12, "parts": 8, "resamples": 20, "kept": {"mean": 0.937, "low": 0.921, "high": 0.951},
        "captured": {"mean": 0.883, "low": 0.861, "high": 0.902}, "bits": moved,
        "groups": [{"groups": groups, "share": 0.85}, {"groups": [sum(groups, [])], "share": 0.15}],
    }  # fmt: skip


def _selection(indices: list[int]) -> dict[str, Any]:
    moved = {"kl": 7.4e-5, "kl_worst": 2.5e-4, "agreement_worst": 1.0}
    shares = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
    return {
        "ratio": 48.0, "limit": 0.001, "documents": 4, "reuse": indices[1::2],
        "own": moved, "reused": {**moved, "kl": 6.4e-5},
        "alone": [{"layer": layer, **moved} for layer in indices[1:]],
        "budgets": [{"share": one, **moved} for one in shares],
        "recall": [{"layer": layer, "median": [0.61, 0.72, 0.834, 0.97],
                    "enough": {"0.95": 0.25, "0.99": None}} for layer in indices],
    }  # fmt: skip


def _tolerance(layer: int, kind: str) -> dict[str, Any]:
    divergence = [1e-8 * (layer + 1), 1e-5, 0.3 / (layer + 1)]
    return {"layer": layer, "kind": kind, "noise": [0.01, 0.1, 1.0], "divergence": divergence,
            "tolerated": 0.1 * (layer + 1)}  # fmt: skip


def _likeness(layers: int) -> list[list[float | None]]:
    return [
        [None if abs(row - column) > 4 else 0.8 ** abs(row - column) for column in range(layers)]
        for row in range(layers)
    ]


def _plan(asked: float, group: list[int]) -> dict[str, Any]:
    columns = int(640 * len(group) / asked)
    runs = [[8, columns // 4 + group[0]], [4, columns], [2, columns // 2]]
    return {"layers": group, "key": runs, "value": runs[1:]}


def _spectrum(power: int) -> list[list[float]]:
    return [[part / 10, 1 - (1 - part / 10) ** power] for part in range(11)]
