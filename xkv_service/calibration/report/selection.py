"""Which layers find tokens by an index of their own, and what budgets of tokens keep."""

from __future__ import annotations

from collections.abc import Iterator

from xkv_service.calibration.report.markup import Markup, element, joined, table
from xkv_service.calibration.report.numbers import counted, percent, short, times
from xkv_service.calibration.report.reading import Figures, amount, items, layers, mapping, number, share

_NONE = "–"


def index_line(figures: Figures) -> str:
    """Which layers keep a selection index, in one line; empty where that is not said."""
    found = mapping(figures.get("selection"))
    if isinstance(reason := found.get("reason"), str):
        return f"every layer: {reason}"
    indices = layers([mapping(one).get("layer") for one in items(found.get("recall"))])
    owners = [one for one in indices if one not in layers(found.get("reuse"))]
    return f"layers {', '.join(map(str, owners))} of {len(indices)}" if owners else ""


def selection(figures: Figures) -> Markup:
    """The layers with an index, and a table of budgets; the reason where nothing was measured."""
    found = mapping(figures.get("selection"))
    if isinstance(reason := found.get("reason"), str):
        return element("p", f"Every layer has an index: {reason}.")
    by_layer = [mapping(one) for one in items(found.get("recall"))]
    indices = layers([one.get("layer") for one in by_layer])
    if not indices:
        return joined()
    budgets = [mapping(one) for one in items(found.get("budgets"))]
    return joined(element("p", *_owners(found, indices)), _table(budgets, by_layer))


def _owners(found: Figures, indices: tuple[int, ...]) -> Iterator[str]:
    reuse = layers(found.get("reuse"))
    owners = ", ".join(str(one) for one in indices if one not in reuse)
    yield f"Of {counted(len(indices), 'layer')} these have a selection index: {owners}. "
    own, reused = (number(mapping(found.get(name)).get("kl")) for name in ("own", "reused"))
    ratio = number(found.get("ratio"))
    if reuse and own is not None and reused is not None and ratio is not None:
        yield (
            "The others attend to what the layer before them chose: at "
            f"{times(ratio)} {short(reused)} nats instead of {short(own)}."
        )


def _table(budgets: list[Figures], by_layer: list[Figures]) -> Markup:
    """By budget: divergence, and the median recall of each layer."""
    heads = ["Tokens", "Nats", *(f"Layer {one.get('layer')}" for one in by_layer)]
    rows = []
    for place, budget in enumerate(budgets):
        part, moved = share(budget.get("share")), amount(budget.get("kl"))
        if part is not None:
            nats = _NONE if moved is None else short(moved)
            rows.append([f"{percent(part)} of a document", nats, *(_recall(one, place) for one in by_layer)])
    caption = "What a budget costs, and the share of each layer’s attention that it keeps (median)"
    return table(caption, heads, rows) if rows else joined()


def _recall(layer: Figures, place: int) -> str:
    medians = items(layer.get("median"))
    found = share(medians[place]) if place < len(medians) else None
    return _NONE if found is None else percent(found)
