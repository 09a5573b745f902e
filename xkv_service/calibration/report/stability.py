"""How much hangs on which documents the sample held: what `bootstrap` found, as lines and as a table."""

from __future__ import annotations

from collections.abc import Iterator

from xkv_service.calibration.limits import ENOUGH
from xkv_service.calibration.report.markup import Markup, element, joined, table
from xkv_service.calibration.report.numbers import counted, percent, span
from xkv_service.calibration.report.reading import Figures, amount, items, layers, mapping, number, share

_MOST = 3
"""Partitions shown."""


def certainty_lines(figures: Figures) -> list[tuple[str, str]]:
    """Name and text of each thing that draws of the sample say; nothing where it was not drawn again.

    Energies are those of the documents that a draw left out ("others").
    """
    found = mapping(figures.get("stability"))
    parts, documents, draws = (number(found.get(name)) for name in ("parts", "documents", "resamples"))
    if parts is None or documents is None or draws is None:
        return []
    how = f"{draws:g} times, from {counted(parts, 'part')} of {counted(documents, 'document')}"
    again = mapping(figures.get("chosen_again"))
    lines = [
        ("Drawn again", how),
        ("Energy kept", _spread(found.get("kept"), "what others' own directions hold")),
        ("Energy held", _spread(found.get("captured"), "all that others have")),
        ("Same metric", _again(again.get("metric"))),
        ("Same groups", _again(again.get("groups"))),
        ("Searched groups", ", ".join(_partitions(found.get("groups")))),
    ]
    return [(name, text) for name, text in lines if text]


def stability(figures: Figures) -> Markup:
    """The lines, what they mean, and how far the bits of each group move."""
    lines = certainty_lines(figures)
    if not lines:
        return joined()
    rows = list(_bits(mapping(figures.get("stability")).get("bits")))
    moved = table("Bits of a token: of the sample, least and most of draws", _HEADS, rows) if rows else ""
    listed = element("dl", *(joined(element("dt", name), element("dd", text)) for name, text in lines))
    return joined(element("p", _MEANING), listed, moved)


_HEADS = ["Layers", "", "Bits", "Least", "Most"]
_MEANING = (
    "The sample was drawn again from its own documents, and bases made of each draw were held against the "
    f"documents that it left out, the others. Below {percent(ENOUGH)} of energy kept the sample is small."
)


def _spread(value: object, of: str) -> str:
    mean, low, high = (share(mapping(value).get(name)) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return ""
    return f"{percent(mean)} ({percent(low)} to {percent(high)}) of {of}"


def _again(value: object) -> str:
    found = share(value)
    return "" if found is None else f"in {percent(found)} of draws of the held-out documents"


def _partitions(value: object) -> Iterator[str]:
    for one in map(mapping, items(value)[:_MOST]):
        groups, often = [layers(group) for group in items(one.get("groups"))], share(one.get("share"))
        if often is not None and groups and all(groups):
            yield f"{' | '.join(map(span, groups))} in {percent(often)} of draws"


def _bits(value: object) -> Iterator[list[str]]:
    for one in map(mapping, items(value)):
        group, kind = layers(one.get("layers")), one.get("kind")
        bits = [amount(one.get(name)) for name in ("bits", "low", "high")]
        if group and kind in ("key", "value") and None not in bits:
            yield [span(group), f"{kind}s", *(f"{found:,.0f}" for found in bits if found is not None)]
