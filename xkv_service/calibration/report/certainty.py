"""How sure the report is: what it rests on, what was not measured, and the small print."""

from __future__ import annotations

from itertools import islice

from xkv_service.calibration.report.markup import Markup, element, joined, table
from xkv_service.calibration.report.numbers import counted, percent, short, times
from xkv_service.calibration.report.reading import (
    Figures,
    Validation,
    items,
    mapping,
    number,
)

_MOST_ROWS = 500
_MOST_DEPTH = 3

_SAMPLE = (
    "All figures are of this sample. Documents unlike it may fare differently.",
    "The metric, the groups and the step for each ratio were chosen on the same held-out documents that the "
    "figures are of; if anything this flatters them. The bases were made from other documents.",
)
_SELECTED = "Selection was on: decoding read the positions that the index chose, as a session does."
_DENSE = "Selection was off: every token was rebuilt. Sessions that select tokens may fare differently."
_MEASURES = (
    "Sizes are the bytes stored for a document, its index and exact tokens included. Bases that all "
    "documents share are stored once for the model and not counted.",
    "Divergence is the mean Kullback-Leibler divergence of next-token predictions from those of the exact "
    "cache, in nats: 0 is the same predictions.",
)


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
            "Where no standard error is given there was one document: how much it varies is unknown."
        )
    else:
        lines.append("± is one standard error over documents.")
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
    "stability": "stability over samples",
}


def usual(figures: Figures) -> Markup:
    """Divergences above which a document is unlike the sample."""
    rows = []
    for one in map(mapping, items(figures.get("thresholds"))):
        ratio, worst, limit = (number(one.get(name)) for name in ("ratio", "worst", "kl"))
        if ratio is not None and limit is not None:
            rows.append([times(ratio), "–" if worst is None else short(worst), short(limit)])
    if not rows:
        return joined()
    heads = ["Ratio", "Worst held-out document", "Limit"]
    return table("Fidelity that is usual, nats: a document above the limit is unlike the sample", heads, rows)


def small_print(figures: Figures) -> Markup:
    """What a reader must not take the figures for."""
    selection = mapping(mapping(figures.get("settings")).get("selection"))
    selected = _DENSE if selection.get("selector") == "dense" else _SELECTED
    lines = (*_SAMPLE, selected, *_MEASURES)
    return element("ul", *(element("li", one) for one in lines), class_="plain small")


def facts(value: object, caption: str, depth: int = 0) -> Markup:
    """Figures of any form: numbers and words as they are, lists of records as tables."""
    if isinstance(value, str) or number(value) is not None or isinstance(value, bool):
        return element("p", _plain(value))
    if depth >= _MOST_DEPTH:
        return joined()
    found = mapping(value)
    if found:
        return _record(found, caption, depth)
    listed = list(islice(items(value), _MOST_ROWS))
    records = [mapping(one) for one in listed if mapping(one)]
    if records:
        heads = list(dict.fromkeys(str(key) for one in records for key in one))
        rows = [[_plain(one.get(head)) for head in heads] for one in records]
        return table(caption, [_words(head) for head in heads], rows)
    return element("p", ", ".join(map(_plain, listed))) if listed else joined()


def _record(found: Figures, caption: str, depth: int) -> Markup:
    """Plain entries as one table, the others beneath it."""
    nested = {key: one for key, one in found.items() if mapping(one) or any(map(mapping, items(one)))}
    plain = [[_words(key), _plain(one)] for key, one in found.items() if key not in nested]
    shown = table(caption, ["Figure", "Value"], plain) if plain else ""
    return joined(shown, *(facts(one, _words(key), depth + 1) for key, one in nested.items()))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    known = number(value)
    if known is not None:
        return f"{known:,.0f}" if known == int(known) and abs(known) < 1e9 else short(known)
    if isinstance(value, str):
        return value
    return ", ".join(_plain(one) for one in islice(items(value), 20) if not items(one)) or "–"


def _words(key: object) -> str:
    words = str(key).replace("_", " ")
    return words[:1].upper() + words[1:]
