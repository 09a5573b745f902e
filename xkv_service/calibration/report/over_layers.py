"""Charts over a model's layers: groups, bits, what each layer stands, and how alike layers are."""

from __future__ import annotations

import math

from xkv_service.calibration.report.charts import SIDES, Heat, Side, Stacks
from xkv_service.calibration.report.curves import PLURAL
from xkv_service.calibration.report.numbers import percent, power, short, times
from xkv_service.calibration.report.reading import (
    Figures,
    amount,
    groups,
    items,
    layers,
    mapping,
    matrix,
    number,
)

_PALEST, _FULLEST = -6, 0
"""Powers of ten of the divergences, nats, that the palest and the fullest shade stand for."""
_UNION = "Layers of a block share token factors."


def group_chart(figures: Figures) -> Stacks | None:
    """The groups alone."""
    found = tuple(groups(figures))
    return Stacks("groups", "Groups of layers", _UNION, found, (), {}) if found else None


def plan_charts(figures: Figures) -> list[Stacks]:
    """Bits by group at each ratio that there is a plan for, lowest first; a level is the same in all."""
    plans = {
        ratio: _groups_of(plan)
        for key, plan in mapping(figures.get("plans")).items()
        if (ratio := _ratio(key)) is not None
    }
    runs = [run for plan in plans.values() for _, sides in plan for run in sides.values()]
    levels = sorted({bits for run in runs for bits in run})
    return [_plan(ratio, plan, levels) for ratio, plan in sorted(plans.items()) if _any_bits(plan)]


def _ratio(key: object) -> float | None:
    try:
        return amount(float(str(key).removesuffix("x")))
    except ValueError:
        return None


_Groups = list[tuple[tuple[int, ...], dict[Side, dict[float, float]]]]


def _groups_of(plan: object) -> _Groups:
    """The layers of each group and, by side, its bits a token by bits of a number."""
    rows = sorted(
        ((of, row) for row in map(mapping, items(plan)) if (of := layers(row.get("layers")))),
        key=lambda one: one[0],
    )
    return [(of, {side: _runs(row.get(side)) for side in SIDES}) for of, row in rows]


def _any_bits(plan: _Groups) -> bool:
    return any(run for _, sides in plan for run in sides.values())


def _plan(ratio: float, plan: _Groups, levels: list[float]) -> Stacks:
    return Stacks(
        f"plan-{ratio:g}",
        f"Bits over the layers at {times(ratio)}",
        "Bits of factors for each token: keys upwards, values downwards. Fuller shade: more bits a number.",
        tuple(of for of, _ in plan),
        tuple(f"{bits:g} bits" for bits in levels),
        {side: tuple(tuple(sides[side].get(b, 0.0) for b in levels) for _, sides in plan) for side in SIDES},
    )


def _runs(value: object) -> dict[float, float]:
    """Bits a token, by bits of a number, of [[bits, columns], ...]."""
    found: dict[float, float] = {}
    for pair in map(items, items(value)):
        bits, columns = (amount(pair[0]), amount(pair[1])) if len(pair) == 2 else (None, None)
        if bits and columns:
            found[bits] = found.get(bits, 0.0) + bits * columns
    return found


def likeness_charts(figures: Figures) -> list[Heat]:
    """How alike the keys, and the values, of every two layers are."""
    found = mapping(figures.get("likeness"))
    return [chart for side in SIDES if (chart := _likeness(figures, side, found.get(side)))]


def _likeness(figures: Figures, side: Side, value: object) -> Heat | None:
    rows = matrix(value)
    if not rows:
        return None
    order = sorted(layer for group in groups(figures) for layer in group)
    known = tuple(order) if len(order) == len(rows) else tuple(range(len(rows)))
    cells = tuple(tuple(None if one is None else (one, f"{one:.2f}") for one in row) for row in rows)
    note = "1 is the same but for a rotation, 0 unrelated. Outlined: the groups."
    if any(one is None for row in rows for one in row):
        note += " Blank: not compared."
    return Heat(
        f"likeness-{side}",
        f"How alike layers' {PLURAL[side]} are",
        note,
        side,
        cells,
        known,
        (),
        _blocks(known, figures),
        ("0", "1"),
    )


def _blocks(columns: tuple[int, ...], figures: Figures) -> tuple[tuple[int, int], ...]:
    place = {layer: number for number, layer in enumerate(columns)}
    inside = [group for group in groups(figures) if all(layer in place for layer in group)]
    return tuple((place[group[0]], len(group)) for group in inside)


def tolerance_charts(figures: Figures) -> list[Heat]:
    """Divergence by layer and noise, of keys and of values."""
    return [chart for side in SIDES if (chart := _tolerance(figures, side))]


def _tolerance(figures: Figures, side: Side) -> Heat | None:
    found: dict[int, dict[float, float]] = {}
    for row in map(mapping, items(figures.get("tolerances"))):
        layer = layers([row.get("layer")])
        if row.get("kind") == side and layer:
            pairs = zip(items(row.get("noise")), items(row.get("divergence")), strict=False)
            known = ((number(noise), amount(nats)) for noise, nats in pairs)
            found[layer[0]] = {noise: nats for noise, nats in known if noise is not None and nats is not None}
    shares = sorted({noise for one in found.values() for noise in one})
    if not shares:
        return None
    columns = tuple(sorted(found))
    cells = tuple(tuple(_shaded(found[layer].get(one)) for layer in columns) for one in reversed(shares))
    return Heat(
        f"tolerances-{side}",
        f"Noise in one layer's {PLURAL[side]}",
        "Rows: noise, as a share of the layer's own variance. Fuller shade: predictions change more.",
        side,
        cells,
        columns,
        tuple(percent(one) for one in reversed(shares)),
        (),
        (f"{power(_PALEST)} nats or less", "1 nat or more"),
    )


def _shaded(nats: float | None) -> tuple[float, str] | None:
    if nats is None:
        return None
    level = (math.log10(max(nats, 1e-30)) - _PALEST) / (_FULLEST - _PALEST)
    return min(1.0, max(0.0, level)), f"{short(nats)} nats"


def most_sensitive(figures: Figures, most: int = 5) -> list[tuple[int, Side, float]]:
    """(layer, side, share of its own variance that it stands as noise) of those that stand least."""
    found: list[tuple[int, Side, float]] = []
    for row in map(mapping, items(figures.get("tolerances"))):
        layer, tolerated = layers([row.get("layer")]), amount(row.get("tolerated"))
        side = next((one for one in SIDES if one == row.get("kind")), None)
        if layer and side and tolerated is not None:
            found.append((layer[0], side, tolerated))
    return sorted(found, key=lambda one: one[2])[:most]
