"""Line charts of a calibration: what a ratio costs, and how energy spreads over directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from xkv_service.calibration.report.charts import SIDES, Axis, Lines, Point, Series, Side, ticks
from xkv_service.calibration.report.numbers import counted, nats, percent, power, times
from xkv_service.calibration.report.reading import (
    Figures,
    Trial,
    Validation,
    decided_ratio,
    items,
    mapping,
    share,
)

PLURAL = {"key": "keys", "value": "values"}
_LEAST_NATS = 1e-12
_MOST_LABELS = 7

Measured = Callable[[Trial], "tuple[float, float, float, str] | None"]


def accuracy_charts(figures: Figures) -> list[Lines]:
    """Divergence, right answers and agreement against the ratio, a line for each step."""
    found, decided = Validation.of(figures), decided_ratio(figures)
    best = found.chosen(decided) if decided is not None else None
    bold = best[0] if best else ""
    divergence, agreement = _series(found, _divergence, bold), _series(found, _agreement, bold)
    answers = _series(found, _answers, bold)
    charts = []
    if divergence:
        charts.append(
            Lines(
                "divergence", "Divergence from the exact cache",
                "Lower is better. 0 would be the same predictions; the scale is logarithmic.",
                _ratio_axis(found, divergence), _nats_axis(divergence), divergence,
            )
        )  # fmt: skip
    if answers:
        charts.append(
            Lines(
                "answers", "Right answers", f"Higher is better. {_exact_answers(found)}",
                _ratio_axis(found, answers), _share_axis("share of questions", answers), answers,
            )
        )  # fmt: skip
    if agreement:
        charts.append(
            Lines(
                "agreement", "Same likeliest token",
                "Higher is better: the share of positions at which greedy decoding would not change.",
                _ratio_axis(found, agreement), _share_axis("share of positions", agreement), agreement,
            )
        )  # fmt: skip
    return charts


def _divergence(trial: Trial) -> tuple[float, float, float, str] | None:
    if trial.kl is None:
        return None
    error = trial.kl_error or 0.0
    return trial.kl, max(0.0, trial.kl - error), trial.kl + error, f"{nats(trial.kl, error)} nats"


def _agreement(trial: Trial) -> tuple[float, float, float, str] | None:
    if trial.agreement is None:
        return None
    return trial.agreement, trial.agreement, trial.agreement, percent(trial.agreement)


def _answers(trial: Trial) -> tuple[float, float, float, str] | None:
    if trial.answers is None:
        return None
    return trial.answers, trial.answers, trial.answers, f"{percent(trial.answers)} right"


def _exact_answers(found: Validation) -> str:
    """How many questions there were, and what the exact cache makes of them."""
    most = max(found.trials.values(), key=lambda one: one.questions or 0)
    asked = f"Of {counted(most.questions, 'question')}" if most.questions else "Of the questions"
    exact = "" if most.answers_exact is None else f" The exact cache has {percent(most.answers_exact)}."
    return f"{asked} those whose every token of the answer is the likeliest one.{exact}"


def _series(found: Validation, measured: Measured, bold: str) -> tuple[Series, ...]:
    series = []
    for style, step in enumerate(found.steps):
        points = []
        for asked in found.ratios:
            trial = found.at(asked, step)
            value = measured(trial) if trial else None
            if trial and value:
                x = max(1.0, trial.ratio or asked)
                points.append(Point(x, *value[:3], f"{step}, {times(x)}: {value[3]}"))
        if points:
            series.append(Series(step, style, tuple(points), step == bold))
    return tuple(series)


def _ratio_axis(found: Validation, series: tuple[Series, ...]) -> Axis:
    places = [*found.ratios, *(point.x for one in series for point in one.points)]
    low, high = min(places) / 1.08, max(places) * 1.08
    shown = tuple((asked, f"{asked:g}x") for asked in found.ratios)
    return Axis("compression ratio", low, high, shown, log=True)


def _nats_axis(series: tuple[Series, ...]) -> Axis:
    points = [point for one in series for point in one.points]
    low = min((value for point in points for value in (point.y, point.low) if value > 0), default=1.0)
    first = math.floor(math.log10(max(_LEAST_NATS, low)))
    last = max(first + 1, math.ceil(math.log10(max(_LEAST_NATS, *(point.high for point in points), low))))
    every = math.ceil((last - first + 1) / _MOST_LABELS)
    shown = tuple((10.0**one, power(one)) for one in range(last, first - 1, -every))
    return Axis("nats", 10.0**first, 10.0**last, shown, log=True)


def _share_axis(label: str, series: Sequence[Series]) -> Axis:
    """Up to all, from a round share below the least."""
    least = min(point.y for one in series for point in one.points)
    low = min(0.9, math.floor(least * 20) / 20)
    return Axis(label, low, 1.0, tuple((one, percent(round(one, 6))) for one in ticks(low, 1.0)))


def spectra_charts(figures: Figures) -> list[Lines]:
    """Energy kept against the share of the directions kept, a line for each size of a group."""
    found = mapping(figures.get("spectra"))
    return [chart for side in SIDES if (chart := _spectrum(side, mapping(found.get(side))))]


def _spectrum(side: Side, by_size: Figures) -> Lines | None:
    series = []
    for style, (size, curve) in enumerate(by_size.items()):
        points = tuple(
            Point(x, y, y, y, f"groups of {size}: {percent(x)} of the width keeps {percent(y)}")
            for x, y in sorted(_curve(curve))
        )
        if points:
            series.append(Series(f"groups of {size}", style, points))
    if not series:
        return None
    wide = Axis(
        "share of the group's width", 0.0, 1.0, tuple((x, percent(x)) for x in (0, 0.25, 0.5, 0.75, 1))
    )
    kept = _share_axis("energy kept", series)
    return Lines(
        f"spectra-{side}", f"Energy of the {PLURAL[side]}",
        "Steeper is better: few directions then hold most of what there is to store.",
        wide, kept, tuple(series), side,
    )  # fmt: skip


def _curve(value: object) -> Iterator[tuple[float, float]]:
    """The pairs of shares in it."""
    for pair in map(items, items(value)):
        x, y = (share(pair[0]), share(pair[1])) if len(pair) == 2 else (None, None)
        if x is not None and y is not None:
            yield x, y
