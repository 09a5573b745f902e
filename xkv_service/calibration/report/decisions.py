"""What each decision gained: step by step, and between the metrics and the groups that were tried."""

from __future__ import annotations

from xkv_service.calibration.limits import ERRORS
from xkv_service.calibration.report.markup import Markup, breakable, element, joined, table
from xkv_service.calibration.report.names import METRIC_NAMES, explained
from xkv_service.calibration.report.numbers import counted, nats, percent, short, times
from xkv_service.calibration.report.reading import Figures, Trial, Validation, apart, mapping

WITHIN = f"within {ERRORS} errors"
"""Said of divergences of which neither is better."""
_FAR = 0.05
"""Ratios further apart than this share are told."""
_MOST = 1e9
"""No gain is told beyond."""
_NONE = "–"
_BEFORE = {
    "bits": "ranks and weights",
    "calibrated bases": "ranks and weights",
    "calibrated bases, 4 bits": "calibrated bases",
    "calibrated bases, bits": "calibrated bases",
}
"""Steps that add a decision to another than the one tried before them."""


def steps_table(figures: Figures) -> Markup:
    """At each ratio, divergence, answers and agreement of every step, and its gain over the one before."""
    found = Validation.of(figures)
    if not found.trials:
        return joined()
    rows = []
    for number, step in enumerate(found.steps):
        before = _BEFORE.get(step) or (found.steps[number - 1] if number else "")
        over = element("small", f"over {before}") if before else ""
        rows.append([joined(step, over), *(_cell(found, one, step, before) for one in found.ratios)])
    heads = ["Step", *(times(one) for one in found.ratios)]
    right = ", right answers" if any(one.answers is not None for one in found.trials.values()) else ""
    caption = (
        f"Divergence (nats){right}, agreement, and the gain over the step named if beyond {ERRORS} errors"
    )
    return joined(table(caption, heads, rows), _reasons(found))


def _cell(found: Validation, asked: float, step: str, before: str) -> Markup:
    trial, best = found.at(asked, step), found.chosen(asked)
    if trial is None or trial.kl is None:
        return element("small", "not measured")
    agreed = element("small", f"{percent(trial.agreement)} agree") if trial.agreement is not None else ""
    right = element("small", f"{percent(trial.answers)} right") if trial.answers is not None else ""
    mark = element("small", "✓ chosen", class_="chosen") if best and best[1] is trial else ""
    figure = element("strong", nats(trial.kl, trial.kl_error))
    return joined(figure, right, agreed, _gain(trial, found.at(asked, before)), _stored(asked, trial), mark)


def _stored(asked: float, trial: Trial) -> Markup:
    """The ratio that was reached where it is another than the one asked for."""
    far = trial.ratio is not None and abs(trial.ratio - asked) > _FAR * asked
    return element("small", f"stored at {times(trial.ratio)}") if far and trial.ratio else joined()


def _gain(trial: Trial, before: Trial | None) -> Markup:
    """Green or red only where the two are known to be apart, words alone where no error is known."""
    if before is None or not before.kl or not trial.kl:
        return joined()
    known = apart(before, trial)
    if known is False:
        return element("small", WITHIN)
    low, high = sorted((before.kl, trial.kl))
    by = short(min(_MOST, high / low))
    if by == short(1.0):
        return element("small", "the same" if low == high else "about the same")
    less = trial.kl == low
    words = f"{by}x {'less' if less else 'more'}"
    if known is None:
        return element("small", words)
    return element("small", words, class_="good" if less else "bad")


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
    "Value error", "Documents", "Right answers",
)  # fmt: skip


def _measures(trial: Trial) -> list[str]:
    known = [
        (trial.ratio, times), (trial.kl, short), (trial.kl_error, short), (trial.kl_worst, short),
        (trial.agreement, percent), (trial.agreement_worst, percent), (trial.key_error, percent),
        (trial.value_error, percent), (trial.documents, "{:g}".format),
        (trial.answers, percent),
    ]  # fmt: skip
    return [_NONE if value is None else show(value) for value, show in known]


def choices(figures: Figures) -> Markup:
    """The metrics and the groups that were tried, the chosen ones marked."""
    metrics, partition = mapping(figures.get("metrics")), mapping(figures.get("partition"))
    tried = {str(name): Trial.of(mapping(row)) for name, row in metrics.items()}
    groups = {str(name): Trial.of(mapping(row)) for name, row in partition.items()}
    chosen = str(figures.get("weighting"))
    parts = [_choice("Metrics tried", tried, chosen), explained(tried, METRIC_NAMES)] if tried else []
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
        label = breakable((names or {}).get(name, name))
        head = joined(label, element("small", "✓ chosen", class_="chosen")) if name == chosen else label
        measured = _measures(trial)
        rows.append([head, _compared(trial, tried.get(chosen)), measured[4], measured[6], measured[7]])
    return table(_with_documents(caption, tried), ["", "Nats", "Agreement", "Key error", "Value error"], rows)


def _compared(trial: Trial, chosen: Trial | None) -> Markup:
    """Its divergence, and a word where the choice could have gone either way."""
    found = trial.reason or "not measured" if trial.kl is None else nats(trial.kl, trial.kl_error)
    doubt = chosen is not None and trial is not chosen and apart(trial, chosen) is False
    return joined(found, element("small", f"{WITHIN} of the chosen") if doubt else "")


def _with_documents(caption: str, tried: dict[str, Trial]) -> str:
    counts = {trial.documents for trial in tried.values() if trial.documents is not None}
    return f"{caption}, on {counted(counts.pop(), 'document')}" if len(counts) == 1 else caption
