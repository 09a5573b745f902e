"""What each decision gained: step by step, and between the metrics and the groups that were tried."""

from __future__ import annotations

from xkv_service.calibration.report.markup import Markup, element, joined, table
from xkv_service.calibration.report.numbers import counted, nats, percent, short, times
from xkv_service.calibration.report.reading import Figures, Trial, Validation, mapping

_SAME = 1.05
"""Divergences that differ by less than this factor are called the same."""
_NONE = "–"


def steps_table(figures: Figures) -> Markup:
    """At each ratio, divergence and agreement of every step, and its gain over the step before."""
    found = Validation.of(figures)
    if not found.trials:
        return joined()
    rows = []
    for number, step in enumerate(found.steps):
        before = found.steps[number - 1] if number else None
        cells = [
            _cell(found.at(one, step), found.at(one, before) if before else None) for one in found.ratios
        ]
        rows.append([step, *cells])
    heads = ["Step", *(times(one) for one in found.ratios)]
    caption = "Divergence (nats), agreement, and the gain over the step above"
    return joined(table(caption, heads, rows), _reasons(found))


def _cell(trial: Trial | None, before: Trial | None) -> Markup:
    if trial is None or trial.kl is None:
        return element("small", "not measured")
    agreed = element("small", f"{percent(trial.agreement)} agree") if trial.agreement is not None else ""
    return joined(element("strong", nats(trial.kl, trial.kl_error)), agreed, _gain(trial, before))


def _gain(trial: Trial, before: Trial | None) -> Markup:
    if before is None or not before.kl or not trial.kl:
        return joined()
    if abs(before.kl - trial.kl) <= (before.kl_error or 0) + (trial.kl_error or 0):
        return element("small", "within the error")
    factor = before.kl / trial.kl
    if 1 / _SAME < factor < _SAME:
        return element("small", "the same")
    if factor > 1:
        return element("small", f"{short(factor)}x less", class_="good")
    return element("small", f"{short(1 / factor)}x more", class_="bad")


def _reasons(found: Validation) -> Markup:
    """Why something was not measured, each reason once."""
    places: dict[str, list[str]] = {}
    for (asked, step), trial in found.trials.items():
        if trial.reason is not None:
            places.setdefault(trial.reason, []).append(f"{step} at {times(asked)}")
    lines = [element("li", f"{', '.join(where)}: {reason}") for reason, where in places.items()]
    return element("ul", *lines, class_="plain small") if lines else joined()


def every_figure(figures: Figures) -> Markup:
    """All that was measured of every step at every ratio, folded."""
    found = Validation.of(figures)
    rows = [[step, times(asked), *_measures(trial)] for (asked, step), trial in found.trials.items()]
    heads = ["Step", "Asked", *_MEASURES]
    shown = table("Every step at every ratio", heads, rows)
    return element("details", element("summary", "Every figure"), shown) if rows else joined()


_MEASURES = (
    "Stored", "Nats", "Std. error", "Worst document", "Agreement", "Worst document", "Key error",
    "Value error", "Documents",
)  # fmt: skip


def _measures(trial: Trial) -> list[str]:
    known = [
        (trial.ratio, times), (trial.kl, short), (trial.kl_error, short), (trial.kl_worst, short),
        (trial.agreement, percent), (trial.agreement_worst, percent), (trial.key_error, percent),
        (trial.value_error, percent), (trial.documents, "{:g}".format),
    ]  # fmt: skip
    return [_NONE if value is None else show(value) for value, show in known]


def choices(figures: Figures) -> Markup:
    """The metrics and the groups that were tried, the chosen ones marked."""
    metrics, partition = mapping(figures.get("metrics")), mapping(figures.get("partition"))
    tried = {str(name): Trial.of(mapping(row)) for name, row in metrics.items()}
    groups = {str(name): Trial.of(mapping(row)) for name, row in partition.items()}
    parts = [_choice("Metrics tried", tried, str(figures.get("weighting")))] if tried else []
    parts += [_choice("Groups tried", groups, _better(groups), _GROUPS)] if groups else []
    return joined(*parts)


_GROUPS = {"fixed": "fixed: all of the same size", "chosen": "searched: of least cost"}


def _better(groups: dict[str, Trial]) -> str:
    """The searched groups where they diverge less than the fixed ones, as calibration decides."""
    fixed, searched = (groups.get(name) for name in ("fixed", "chosen"))
    if searched and searched.kl is not None and (fixed is None or fixed.kl is None or searched.kl < fixed.kl):
        return "chosen"
    return "fixed"


def _choice(
    caption: str, tried: dict[str, Trial], chosen: str, names: dict[str, str] | None = None
) -> Markup:
    rows = []
    for name, trial in tried.items():
        mark = element("span", "✓ chosen", class_="chosen") if name == chosen else ""
        found = trial.reason or "not measured" if trial.kl is None else nats(trial.kl, trial.kl_error)
        measured = _measures(trial)
        rows.append([(names or {}).get(name, name), found, measured[4], measured[6], measured[7], mark])
    heads = ["", "Nats", "Agreement", "Key error", "Value error", "Chosen"]
    return table(_with_documents(caption, tried), heads, rows)


def _with_documents(caption: str, tried: dict[str, Trial]) -> str:
    counts = {trial.documents for trial in tried.values() if trial.documents is not None}
    return f"{caption}, on {counted(counts.pop(), 'document')}" if len(counts) == 1 else caption
