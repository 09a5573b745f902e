"""How sure the report is: what it rests on, what was not measured, and the small print."""

from __future__ import annotations

from xkv_service.calibration.limits import ERRORS, LEAST_KL, LOST, TIMES_WORST
from xkv_service.calibration.report.markup import Markup, element, joined, table
from xkv_service.calibration.report.numbers import counted, percent, short, times
from xkv_service.calibration.report.reading import Figures, Validation, items, mapping, number

_SAMPLE = (
    "All figures are of this sample. Documents unlike it may fare differently.",
    "The metric, the groups and the step for each ratio were chosen on the same held-out documents that the "
    "figures are of; if anything this flatters them. The bases were made from other documents.",
)
_SELECTED = "Selection was on: decoding read the positions that the index chose, as a session does."
_DENSE = "Selection was off: every token was rebuilt. Sessions that select tokens may fare differently."


def certainty(figures: Figures) -> Markup:
    """The documents behind the figures, their errors, and the gaps."""
    lines = [*_documents(figures), *_gaps(figures)]
    return element("ul", *(element("li", one) for one in lines), class_="plain") if lines else joined()


def _documents(figures: Figures) -> list[str]:
    found = Validation.of(figures)
    counts = [trial.documents for trial in found.trials.values() if trial.documents is not None]
    if not counts:
        return []
    least = "at least " if len(set(counts)) > 1 else ""
    errors = [trial for trial in found.trials.values() if trial.kl is not None and trial.kl_error is None]
    lines = [f"Each figure rests on {least}{counted(min(counts), 'held-out document')}."]
    if errors:
        lines.append(
            "Where no standard error is given there was one document: how much it varies is unknown, and "
            "no gain is coloured."
        )
    else:
        lines.append(
            f"± is one standard error over documents; better is what is beyond {ERRORS} of a difference."
        )
    return lines


def _gaps(figures: Figures) -> list[str]:
    """What was not measured."""
    found = Validation.of(figures)
    missing = [f"{step} at {times(asked)}" for (asked, step), one in found.trials.items() if one.kl is None]
    lines = [f"Not measured: {', '.join(missing)}."] if missing else []
    unknown = [name for key, name in _PARTS.items() if not figures.get(key)]
    lines += [f"Not in this calibration: {', '.join(unknown)}."] if unknown else []
    pairs = [
        one for side in mapping(figures.get("likeness")).values() for row in items(side) for one in items(row)
    ]
    blank = sum(number(one) is None for one in pairs)
    if blank:
        lines.append(f"{percent(blank / len(pairs))} of pairs of layers were not compared.")
    return lines


_PARTS = {
    "validation": "validation",
    "tolerances": "what each layer stands",
    "likeness": "likeness of layers",
    "plans": "bits by group",
    "spectra": "spectra",
    "stability": "draws of the sample",
}


def usual(figures: Figures) -> Markup:
    """Divergences above which a document is unlike the sample."""
    rows = []
    for one in map(mapping, items(figures.get("thresholds"))):
        ratio, worst, limit = (number(one.get(name)) for name in ("ratio", "worst", "kl"))
        if ratio is not None and limit is not None:
            rows.append([times(ratio), "–" if worst is None else short(worst), short(min(LOST, limit))])
    if not rows:
        return joined()
    heads = ["Ratio", "Worst held-out document", "Limit"]
    rule = f"{TIMES_WORST:g} times the worst, {LEAST_KL:g} at least, {LOST:g} at most: answers are lost above"
    caption = f"Fidelity that is usual, nats: a document above the limit is low ({rule})"
    return table(caption, heads, rows)


def small_print(figures: Figures) -> Markup:
    """What a reader must not take the figures for."""
    selection = mapping(mapping(figures.get("settings")).get("selection"))
    selected = _DENSE if selection.get("selector") == "dense" else _SELECTED
    lines = (*_SAMPLE, selected)
    return element("ul", *(element("li", one) for one in lines), class_="plain small")
